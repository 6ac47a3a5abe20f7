"""`fvlm space`: write a folder that Hugging Face runs as a Space, with the web page of `fvlm serve` for a released model."""

import re
import shutil
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from fvlm_core.errors import UserError
from infra.stack import REPOSITORY

PORT = 7860
PACKAGES = ("deployments", "flows", "fvlm_core", "infra", "tasks")
FILES = ("LICENSE", "README.md", "pyproject.toml", "requirements.lock")
REPOSITORY_NAME = re.compile(r"[\w.-]+/[\w.-]+")

CARD = """---
title: {title}
emoji: 👁
colorFrom: yellow
colorTo: red
sdk: docker
app_port: {port}
license: apache-2.0
models:
  - {model}
short_description: Ask a video a question, and see where the model looks
---

# {title}

Drop a video, ask a question before or after it, and see where [{model}](https://huggingface.co/{model}) looks in every frame.
OpenAI's API is at `/v1`.

Made by `fvlm space`: the Dockerfile installs the code in `code/` and runs `fvlm serve`. If the Space has a secret `FVLM_API_KEY`, every
request must give it.
"""
DOCKERFILE = """# docs: https://huggingface.co/docs/hub/spaces-sdks-docker
FROM python:3.11-slim
RUN useradd --create-home --uid 1000 user
USER user
ENV PATH=/home/user/.local/bin:$PATH HF_HOME=/home/user/.cache/huggingface
WORKDIR /home/user/app
COPY --chown=user code code
RUN pip install --no-cache-dir --user {index}-r code/requirements.lock && pip install --no-cache-dir --user --no-deps ./code
EXPOSE {port}
CMD ["fvlm", "serve", "{model}", "--host", "0.0.0.0", "--port", "{port}"]
"""
CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu "


def space(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("space"),
    hardware: Literal["cpu", "gpu"] = "cpu",
) -> int:
    """Write a Hugging Face Space that serves a released model; upload the folder to a Space with the SDK `docker`.

    Parameters
    ----------
    model
        The model's repository on the hub, OWNER/NAME.
    output
        Folder to write; it must not exist.
    hardware
        Hardware of the Space; decides which build of torch it installs.
    """
    if not REPOSITORY_NAME.fullmatch(model):
        raise UserError("a Space loads its model from the hub", where=model, fix="give the model's repository, OWNER/NAME")
    if output.exists():
        raise UserError("it exists already", where=str(output), fix="give another --output, or remove it")
    if missing := [file for file in FILES if not (REPOSITORY / file).is_file()]:
        raise UserError(
            f"a Space needs the code of a checkout, and this is not one: {', '.join(missing)} missing",
            where=str(REPOSITORY),
            fix="run the command in a checkout; an installed package lacks these files",
        )
    values = {"title": f"{model.split('/')[1]} demo", "port": PORT, "model": model, "index": CPU_INDEX if hardware == "cpu" else ""}
    code = output / "code"
    code.mkdir(parents=True)
    (output / "README.md").write_text(CARD.format(**values))
    (output / "Dockerfile").write_text(DOCKERFILE.format(**values))
    for file in FILES:
        shutil.copyfile(REPOSITORY / file, code / file)
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    Console(highlight=False).print(f"wrote {output}: hf upload YOUR/SPACE {output} . --repo-type space", markup=False, soft_wrap=True)
    return 0
