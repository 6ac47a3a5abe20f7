"""The stand-in vision encoder: learns, loads like any DINOv2 checkpoint, and is the same every time."""

import torch
from transformers import Dinov2Model

from fvlm_core.config import OptimizerSettings, VisionShape
from fvlm_core.train.jobs import VisionJob, VisionTrainingSettings
from fvlm_core.train.vision import pretrained, probe_accuracy, train_vision


def test_it_learns_digits_and_loads_in_transformers(tmp_path):
    shape = VisionShape(width=32, layers=2, heads=2)
    optimizer = OptimizerSettings(lr_vision=4e-3, warmup_steps=10)
    jobs = [VisionJob(output=tmp_path / name, shape=shape, steps=60, batch_frames=48, optimizer=optimizer) for name in "ab"]
    first, second = (train_vision(job) for job in jobs)
    assert first.digest == second.digest
    assert first.counts["own_per_mille"] > 500  # chance is 100
    assert Dinov2Model.from_pretrained(tmp_path / "a").config.hidden_size == 32


def test_it_learns_colours_and_crosses_where_asked_for():
    shape = VisionShape(width=32, layers=2, heads=2)
    optimizer = OptimizerSettings(lr_vision=4e-3, warmup_steps=10)
    settings = VisionTrainingSettings(steps=60, batch_frames=48, optimizer=optimizer, copies=1, colours=6, crosses=True)
    _, accuracy = pretrained(settings, shape)
    assert set(accuracy) == {"own", "right", "below", "colour", "cross"}
    assert accuracy["colour"] > 0.8  # chance is 1 / 6
    assert accuracy["own"] > 0.3  # chance is 1 / 11; where the cross is takes a thousand steps


def test_what_an_encoder_knows_is_read_off_it_without_changing_it():
    settings = VisionTrainingSettings(steps=150, batch_frames=16, optimizer=OptimizerSettings(lr_vision=4e-3, warmup_steps=10))
    encoder, before = pretrained(settings, VisionShape(width=32, layers=2, heads=2))
    weights = {name: one.clone() for name, one in encoder.state_dict().items()}
    after = probe_accuracy(encoder, settings)
    assert all(torch.equal(weights[name], one) for name, one in encoder.state_dict().items())
    assert after["own"] > before["own"] - 0.05
    torch.nn.init.zeros_(encoder.patches.weight)
    assert probe_accuracy(encoder, settings)["own"] < 0.2, "nothing is seen"
