"""What a released folder adds to the model's own modules: configuration, model and processor as transformers expects them."""
