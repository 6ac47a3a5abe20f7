"""The foveated model: encoder, packed attention, the three modes, and their cost."""
