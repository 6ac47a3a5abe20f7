"""`fvlm convert`: checkpoints of the original fVLM to models of ours, and back; models of ours to ONNX."""

from pathlib import Path

from cyclopts import App
from rich.console import Console

app = App(name="convert", help="Convert checkpoints of the original fVLM to models of ours, and back; models of ours to ONNX.")


@app.command
def ours(
    checkpoint: Path,
    out: Path,
    *,
    vision: str = "facebook/dinov2-small",
    llm: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    tokenizer: str | None = None,
    frame_px: int = 224,
) -> int:
    """Write a checkpoint of the original fVLM as a model folder, like a finished run's `model/`.

    Parameters
    ----------
    checkpoint
        A safetensors file, a `.pt` of the original's trainer, or a folder as on the hub.
    out
        Folder to write; it must not exist.
    vision
        Hub name or folder of the DINOv2 it was built with; only its configuration is read.
    llm
        Hub name or folder of the SmolLM2 it was built with; only its configuration is read, and its tokenizer.
    tokenizer
        Hub name or folder of the tokenizer; by default the language model's.
    frame_px
        Side of the square frames that the model sees.
    """
    from fvlm_core.model.convert import convert_to_ours

    convert_to_ours(checkpoint, out, vision=vision, llm=llm, tokenizer=tokenizer, frame_px=frame_px)
    Console().print(f"wrote {out}", highlight=False)
    return 0


@app.command
def original(model_folder: Path, out: Path) -> int:
    """Write a model folder as a checkpoint that the original fVLM's code loads.

    Parameters
    ----------
    model_folder
        The `model/` of a finished run.
    out
        Safetensors file to write; it must not exist.
    """
    from fvlm_core.model.convert import convert_to_original

    convert_to_original(model_folder, out)
    Console().print(f"wrote {out}", highlight=False)
    return 0


@app.command
def onnx(model_folder: Path, out: Path) -> int:
    """Write a model folder's reading of frames and its coarse mode as graphs for onnxruntime. Needs the extra `onnx`.

    Parameters
    ----------
    model_folder
        The `model/` of a finished run.
    out
        Folder for `read.onnx` and `coarse.onnx`.
    """
    from fvlm_core.model.build import load_model
    from fvlm_core.release.onnx_export import export_onnx

    for path in export_onnx(load_model(model_folder).eval(), out):
        Console().print(f"wrote {path}", highlight=False)
    return 0
