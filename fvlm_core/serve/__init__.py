"""Using a model: streams of frames, questions at any time."""
