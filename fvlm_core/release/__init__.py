"""The release: a model folder for the Hugging Face hub that works without this project, and a report of how it was made."""
