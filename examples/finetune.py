"""Fine-tune a released model on one's own clips with transformers' Trainer or TRL's SFT; the result is a released folder again.

    pip install ".[finetune]"   # in a checkout
    python examples/finetune.py fVLM-135M clips.jsonl fine-tuned --steps 200 [--trl]

Every line of `clips.jsonl` is `{"video": "a.mp4", "question": "What happens?", "answer": "A dog jumps."}`; paths are relative to the file.
The loss is that of our own training: all passes, on the tokens of the answers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

IGNORE = -100


def conversations(data: Path) -> list[dict[str, Any]]:
    """A conversation per line, under `messages`, with the question before the video."""
    made = []
    for line in filter(None, data.read_text().splitlines()):
        row = json.loads(line)
        content = [{"type": "text", "text": row["question"]}, {"type": "video", "video": str(data.parent / row["video"])}]
        answer = [{"type": "text", "text": row["answer"]}]
        made.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    return made


class Collator:
    """Conversations to a batch whose labels are the answers."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        chats = [row["messages"] for row in rows]
        batch = self.processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        learned = batch.pop("assistant_masks").bool()
        return {**batch, "labels": batch["input_ids"].where(learned, IGNORE)}


def finetune(model_name: str, data: Path, output: Path, *, steps: int, batch: int, rate: float, with_trl: bool = False) -> Trainer:
    """Train and save."""
    kind, arguments, options, rows = Trainer, TrainingArguments, {}, conversations(data)
    if with_trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        class ModelsLoss(SFTTrainer):
            """SFT with the loss that the model returns, over all its passes; TRL's own is over the logits of one."""

            compute_loss = Trainer.compute_loss

        kind, arguments, rows = ModelsLoss, SFTConfig, Dataset.from_list(rows)
        # the collator prepares and never cuts; TRL asks for bf16 by itself, which it refuses without a GPU
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "bf16": torch.cuda.is_available()}
    model = AutoModelForImageTextToText.from_pretrained(model_name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(model_name, trust_remote_code=True)
    settings = arguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,  # the collator reads conversations, not columns
        report_to="none",
        **options,
    )
    trainer = kind(
        model=model,
        args=settings,
        train_dataset=rows,  # any sequence will do
        data_collator=Collator(processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a released folder or a hub name")
    parser.add_argument("data", type=Path, help="jsonl with video, question and answer")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--trl", action="store_true", help="with TRL's SFTTrainer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-5)
    arguments = parser.parse_args()
    settings = {"steps": arguments.steps, "batch": arguments.batch, "rate": arguments.rate, "with_trl": arguments.trl}
    finetune(arguments.model, arguments.data, arguments.output, **settings)
