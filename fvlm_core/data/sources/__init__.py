"""One adapter per published dataset: from its own schema to our table of videos or to chats."""

PROMPTS = {
    "webvid": "What would be the WebVid caption for this video?",
    "openvid": "What would be the OpenVid caption for this video?",
}
"""What is asked for when a dataset's caption is the answer: captions in a dataset's own manner are not passed off as descriptions."""
DEFAULT_PROMPT = "What is the caption of this video?"


def caption_prompt(source: str) -> str:
    """The honest question to a caption of that source."""
    return PROMPTS.get(source, DEFAULT_PROMPT)
