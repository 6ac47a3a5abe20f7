"""The foveated model: encoder, connector, language model, the three inference modes, and FLOP counts."""
