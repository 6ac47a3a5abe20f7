"""Load a released folder as a user would, and compare its logits and answers with the expected ones, bit for bit.

Runs as `python -I clean_check.py FOLDER EXPECTED` in a separate process that blocks imports of this project, so that the folder cannot
depend on it. EXPECTED holds safetensors files with inputs and the logits of each mode, and questions with the expected inputs and answers.
Prints JSON: the number of equal logits per mode, and the problems.
"""

import json
import sys
from pathlib import Path


def main(folder: str, expected: str) -> dict[str, object]:
    """Run all comparisons."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    again = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    # compared by name: each load imports the folder's code again, so the classes differ
    same = type(again).__name__ == type(model).__name__ and model.state_dict().keys() == again.state_dict().keys()
    problems = [] if same else [f"AutoModelForImageTextToText gives another model, a {type(again).__name__}"]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    equal: dict[str, int] = {}
    for path in sorted(Path(expected).glob("*.safetensors")):
        tensors = load_file(path)
        logits = {name.removeprefix("logits."): tensors.pop(name) for name in list(tensors) if name.startswith("logits.")}
        inputs = {name.removeprefix("inputs."): tensor for name, tensor in tensors.items() if name.startswith("inputs.")}
        for mode, wanted in logits.items():
            with torch.no_grad():
                found = model(**inputs, mode=mode).logits[inputs["attention_mask"].bool()]
            if torch.equal(found, wanted):
                equal[mode] = equal.get(mode, 0) + wanted.numel()
            else:
                problems.append(f"{mode}: logits differ by up to {float((found - wanted).abs().max()):.3g} in {path.stem}")
    for asked in json.loads((Path(expected) / "questions.json").read_text()):
        tensors = load_file(Path(expected) / asked["file"])
        seen = [{"type": "video", "video": tensors.pop("video")}]
        content = [{"type": "text", "text": asked["question"]}]
        messages = [{"role": "user", "content": content + seen if asked["question_first"] else seen + content}]
        made = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        if set(made) != set(tensors) or any(not torch.equal(made[name], tensor) for name, tensor in tensors.items()):
            problems.append(f"the processor makes other inputs from {asked['file']}")
        for mode, answer in asked["answers"].items():
            given = model.generate(**made, mode=mode, max_new_tokens=len(answer) + 1)[0, made["input_ids"].shape[1] :].tolist()
            if given[: len(answer)] != answer:
                problems.append(f"{mode}: the answer to {asked['file']} is {given}, not {answer}")
    return {"equal": equal, "problems": problems, "project_imported": "fvlm_core" in sys.modules and sys.modules["fvlm_core"] is not None}


if __name__ == "__main__":
    sys.modules["fvlm_core"] = None  # ty: ignore[invalid-assignment] -- an import of the project now fails
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
