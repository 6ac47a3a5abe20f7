"""`fvlm convert`: convert checkpoints of the original fVLM to this project's models and back, and models to ONNX and GGUF."""

from pathlib import Path
from typing import Literal

from cyclopts import App
from rich.console import Console

from deployments.use import FramePx, Llm, Model, Vision, load_model

app = App(name="convert", help="Convert checkpoints of the original fVLM to this project's models and back, and models to ONNX and GGUF.")


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
    """Convert a checkpoint of the original fVLM to a model folder, like a finished run's `model/`.

    Parameters
    ----------
    checkpoint
        A safetensors file, a `.pt` file of the original's trainer, or a folder as on the hub.
    out
        Folder to write; it must not exist.
    vision
        Hub name or folder of the DINOv2 with which it was built; only its configuration is read.
    llm
        Hub name or folder of the SmolLM2 with which it was built; only its configuration and tokenizer are read.
    tokenizer
        Hub name or folder of the tokenizer; by default the language model's.
    frame_px
        Side of the square frames that the model sees.
    """
    from fvlm_core.model.convert import convert_to_ours

    convert_to_ours(checkpoint, out, vision=vision, llm=llm, tokenizer=tokenizer, frame_px=frame_px)
    Console().print(f"wrote {out}", highlight=False, markup=False)
    return 0


@app.command
def original(model_folder: Path, out: Path) -> int:
    """Convert a model folder to a checkpoint that the original fVLM's code can load.

    Parameters
    ----------
    model_folder
        The `model/` of a finished run.
    out
        Safetensors file to write; it must not exist.
    """
    from fvlm_core.model.convert import convert_to_original

    convert_to_original(model_folder, out)
    Console().print(f"wrote {out}", highlight=False, markup=False)
    return 0


@app.command
def onnx(model: Model, out: Path, /, *, vision: Vision = None, llm: Llm = None, frame_px: FramePx = None) -> int:
    """Export a model's parts and its coarse and fine modes as graphs for onnxruntime. Needs the extra `onnx`.

    Parameters
    ----------
    out
        Folder for `read.onnx`, `queries.onnx`, `coarse.onnx` and `fine.onnx`.
    """
    console = Console(highlight=False)
    loaded = load_model(model, vision, llm, frame_px, "cpu", console).subject.model
    from fvlm_core.release.onnx_export import export_onnx

    for path in export_onnx(loaded, out):
        console.print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB", markup=False, soft_wrap=True)
    return 0


@app.command
def gguf(
    model: Model,
    out: Path,
    /,
    *,
    precision: Literal["f32", "f16", "q8_0"] = "f16",
    name: str = "",
    vision: Vision = None,
    llm: Llm = None,
    frame_px: FramePx = None,
) -> int:
    """Export a model's language model and tokenizer as a GGUF file for llama.cpp. Needs the extra `gguf`.

    Parameters
    ----------
    out
        File to write.
    precision
        Precision of the matrices; `q8_0` is 8 bits with a scale for every 32 weights.
    name
        Name of the model in the file; by default the loaded model's name.
    """
    console = Console(highlight=False)
    answerer = load_model(model, vision, llm, frame_px, "cpu", console)
    from fvlm_core.release.gguf_export import export_gguf

    export_gguf(answerer.subject.model.llm, answerer.subject.tokenizer, out, precision=precision, name=name or answerer.name)
    console.print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB", markup=False, soft_wrap=True)
    return 0
