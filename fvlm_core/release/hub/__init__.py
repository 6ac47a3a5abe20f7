"""The transformers classes of a released folder: configuration, model and processor, around the model's own modules."""
