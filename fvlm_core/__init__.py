"""fVLM: a video language model that reads each frame as one token. The science, without orchestration or cloud."""

__version__ = "0.1.0"
