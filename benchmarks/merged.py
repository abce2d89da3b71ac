"""One comparison made of several whose cells may stand in one table: the same model, data and evaluation, and equal budgets."""

from __future__ import annotations

from statistics import mean
from typing import Any

from compressor.comparison.statistics import summary

_ALIKE = ("model", "weights_sha256", "sampler")


def merged(*reports: dict[str, Any]) -> dict[str, Any]:
    """The first of slim `reports`, with the entries of all and each entry's cells of all. Raises ValueError where they may not be
    compared, or a cell stands twice. Its `hardware` names every machine; `dense` is as the first one found it."""
    first = reports[0]
    entries: dict[str, dict[str, Any]] = {}
    for report in reports:
        for what, own, wanted in zip(("", *_ALIKE), _judged(report), _judged(first), strict=True):
            if own != wanted:
                raise ValueError(f"{report['title']}: another {what or 'evaluation'}: {own}, not {wanted}")
        for entry in report["entries"]:
            if _budget(entry) != _budget(first["entries"][0]):
                raise ValueError(f"{report['title']}: {entry['label']}: another budget")
            known = entries.setdefault(entry["label"], {**entry, "cells": []})
            if _method(known) != _method(entry):
                raise ValueError(f"{report['title']}: {entry['label']} is another method")
            known["cells"] += entry["cells"]
    for label, entry in entries.items():
        entry["cells"].sort(key=lambda cell: cell["seed"])
        seeds = [cell["seed"] for cell in entry["cells"]]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{label}: a seed stands twice")
        entry["quality"] = summary([cell["value"] for cell in entry["cells"]]).model_dump(mode="json")
        entry["drift"] = {
            what: {"mean": mean(cell["drift"][what] for cell in entry["cells"])} for what in entry["cells"][0]["drift"]
        }
    seeds = sorted({cell["seed"] for entry in entries.values() for cell in entry["cells"]})
    machines = dict.fromkeys(report["environment"]["hardware"] for report in reports)
    versions = dict.fromkeys(report["environment"]["versions"]["torch"] for report in reports)
    environment = {"hardware": " and ".join(machines), "versions": {"torch": " and ".join(versions)}}
    return {**first, "entries": list(entries.values()), "seeds": seeds, "environment": environment}


def _judged(report: dict[str, Any]) -> list[Any]:
    how = {key: value for key, value in report["evaluate"].items() if not key.startswith("latency")}
    metric = {key: report["metric"][key] for key in ("name", "extractor_sha256")}
    return [(how, metric, report["data"]["sha256"], report["match"]["by"]), *(report[what] for what in _ALIKE)]


def _method(entry: dict[str, Any]) -> tuple[Any, ...]:
    train = {key: value for key, value in entry["recipe_train"].items() if key not in ("seed", "device")}
    return entry["method"], entry["settings"], entry["pattern"], train


def _budget(entry: dict[str, Any]) -> dict[str, Any]:
    """What of the training is the same for all: an entry may have another optimizer, which is what it is compared for."""
    named = ("steps", "batch_size", "accumulate", "lr", "warmup", "schedule", "dtype")
    return {key: entry["recipe_train"][key] for key in named}
