"""The release: a folder for the Hugging Face hub that works without this project, and the report of how it was made."""
