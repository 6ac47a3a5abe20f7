"""Inference: conversations, gaze visualisation, an HTTP server, and video streams."""
