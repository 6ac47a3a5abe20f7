"""Using a model: conversations, where it looks, a server for many, streams of frames."""
