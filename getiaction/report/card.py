"""Write the model card of a policy: what it is, what it learned from, how it did, and how to use it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from getiaction.errors import InputError
from getiaction.report.evaluation import NUMBERS
from getiaction.run_folder import CONFIG, EVALUATION, RUN, run_of

TEMPLATE = """# {name}

A [Diffusion Policy](https://diffusion-policy.cs.columbia.edu/), made with GetiAction {version}. It sees {sees}
and predicts {horizon} actions of {action_dim} numbers, of which {n_action_steps} are executed before it looks again.

## How it did

{evaluation}

## How it was made

{training}

## Use it

{lerobot}
```bash
python -m getiaction.evaluate checkpoint={repo_id} env={env}
python -m getiaction.train training.init_from={repo_id} {overrides} dataset.repo_id=me/my_dataset
```

```python
from getiaction.interop.lerobot import load_policy
from getiaction.policy import Controller

controller = Controller(load_policy("{repo_id}"), seed=0)
```
"""
BOXED = "getiaction/"
"""How the leaves of `conf/dataset/` begin the names of the demonstrations in the box."""
LEROBOT = """With [LeRobot](https://github.com/huggingface/lerobot), on a robot or in a simulator:
`--policy.path={repo_id}`, or `DiffusionPolicy.from_pretrained("{repo_id}")`. With GetiAction:
"""
NOT_LEROBOT = "LeRobot has no equal for this policy ({reasons}). With GetiAction:\n"


def read_run(policy_folder: Path) -> dict[str, Any]:
    """Return a policy's run: `folder`, and `config` and `run`, what its files say; empty if it has none."""
    run = run_of(policy_folder)
    if run is None or not all((run / name).exists() for name in (CONFIG, RUN)):
        return {}
    return {
        "folder": run,
        "config": yaml.safe_load((run / CONFIG).read_text()),
        "run": json.loads((run / RUN).read_text()),
    }


def find_evaluation(policy_folder: Path, given: Path | None) -> Path | None:
    """Return the folder of a policy's evaluation: the one given, or that which its run made at its step; or None.

    Raises:
        InputError: the one given is no evaluation.
    """
    if given is not None:
        if not (given / NUMBERS).exists():
            raise InputError(f"--evaluation {given} holds no {NUMBERS}: give outputs/evaluate/<date_time>")
        return given
    run = run_of(policy_folder)
    own = run / EVALUATION / policy_folder.resolve().parent.name if run else None
    return own if own and (own / NUMBERS).exists() else None


def name_env(made: dict[str, Any], numbers: dict[str, Any] | None) -> str:
    """Return the choice of the group `env` that the policy acts in."""
    env = (numbers or {}).get("env") or made.get("config", {}).get("env") or {}
    return str(env["_target_"]).split(".")[-2] if env.get("_target_") else "none"


def say_evaluation(numbers: dict[str, Any] | None) -> str:
    """Return the table of an evaluation, each number with its 95% interval."""
    if numbers is None:
        return "Not evaluated in a simulator."
    rows = {
        "score A: mean over episodes of the largest reward": numbers["score"],
        "success B: share of episodes": numbers["success"],
        **{f"largest {name}": value for name, value in numbers["largest"].items()},
        "control steps of an episode": numbers["length"],
    }
    lines = [f"| {name} | {say_estimate(value)} |" for name, value in rows.items()]
    env = numbers["env"]
    seeds = [row["seed"] for row in numbers["rows"]]
    where = f"{env['_target_'].rsplit('.', 1)[-1]}, at most {env['max_steps']} steps" if "max_steps" in env else ""
    return "\n".join(
        [
            f"{numbers['episodes']} episodes ({where}; seeds {min(seeds)} to {max(seeds)}), "
            f"{numbers['num_inference_steps']} denoising steps by {numbers['scheduler']['class']}, "
            f"{numbers['policy']['n_action_steps']} actions executed of each chunk, on {numbers['device']}:",
            "",
            "| | mean [95% interval] |",
            "| --- | --- |",
            *lines,
        ]
    )


def say_estimate(value: dict[str, float]) -> str:
    """Return a mean with its interval."""
    digits = 1 if value["mean"] > 10 else 3
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def say_training(made: dict[str, Any]) -> str:
    """Return what is known of the run."""
    if not made:
        return "No run of GetiAction's belongs to this policy: it was imported."
    config, run = made["config"], made["run"]
    training = config["training"]
    length = f"{training['max_steps']} steps" if training["max_steps"] else f"{training['max_epochs']} epochs"
    batch = training["batch_size"] * training["gradient_accumulation_steps"] * run.get("processes", 1)
    command = shlex.join(["python", "-m", "getiaction.train", *run["command"][1:]])
    rows = {
        "preset": config["name"],
        "data": "; ".join(map(say_source, sources_of(made))),
        "length": f"{length} of {batch} samples, seed {config['seed']}",
        "started from": training.get("init_from") or "drawn weights",
        "hardware": f"{run['device']}, precision {run.get('mixed_precision', 'no')}",
        "commit": run["commit"] or f"getiaction {run['versions']['getiaction']}",
    }
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *table, "", "```bash", command, "```"])


def sources_of(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the datasets of a run: one, or several.

    A folder given on the command line is not what the preset's `repo_id` says, unless that was given as well.
    """
    dataset, run = made["config"]["dataset"], made["run"]
    given = {override.split("=", 1)[0].lstrip("+") for override in run.get("overrides", run["command"][1:])}
    if dataset.get("root") is not None and "dataset.root" in given and "dataset.repo_id" not in given:
        dataset = dataset | {"repo_id": None}
    entries = dataset.get("sources") or [dataset]  # a run of before there were several has no such key
    return [entry if isinstance(entry, dict) else as_source(entry) for entry in entries]


def as_source(entry: str) -> dict[str, Any]:
    """Return a dataset that is named by a word alone: a folder, or a name on the Hub."""
    is_folder = entry.count("/") != 1 or entry.startswith(("/", ".", "~"))
    return {"root": entry} if is_folder else {"repo_id": entry}


def on_the_hub(made: dict[str, Any]) -> list[str]:
    """Return the names of those datasets of a run that the Hub may have."""
    names = (source.get("repo_id") for source in sources_of(made))
    return [name for name in names if name and not name.startswith(BOXED)]


def say_source(source: dict[str, Any]) -> str:
    """Return what a run took of one dataset; of a folder only its name."""
    name = source.get("repo_id") or Path(source["root"]).name
    episodes, weight = source.get("episodes"), source.get("weight")
    return (
        name
        + ("" if episodes is None else f", {len(episodes)} episodes")
        + ("" if weight is None else f", weight {weight:g}")
    )


def write_card(
    repo_id: str,
    described: dict[str, Any],
    *,
    version: str,
    reasons: list[str],
    overrides: str,
    made: dict[str, Any],
    numbers: dict[str, Any] | None,
    license: str | None = None,
) -> str:
    """Return the model card, metadata and text.

    Args:
        repo_id: name on the Hub.
        described: what `interop.description.describe` says of the policy.
        version: of this package.
        reasons: why LeRobot does not open it; empty if it does.
        overrides: of a config that builds this policy.
        made: what `read_run` found.
        numbers: `evaluation.json`, or None.
        license: by the Hub's names.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=license,
        library_name="getiaction" if reasons else "lerobot",
        pipeline_tag="robotics",
        tags=["robotics", "diffusion-policy", "getiaction", *([] if reasons else ["lerobot"])],
        datasets=on_the_hub(made) if made else None,
    )
    features = described["features"]
    seen = [key for key in ("state_dim", "env_state_dim") if features[key] is not None]
    names = {"state_dim": "observation.state", "env_state_dim": "observation.environment_state"}
    text = TEMPLATE.format(
        name=repo_id.split("/")[-1],
        version=version,
        sees=", ".join(f"`{key}`" for key in [*(names[key] for key in seen), *features["cameras"]]),
        horizon=described["policy"]["horizon"],
        n_action_steps=described["policy"]["n_action_steps"],
        action_dim=features["action_dim"],
        evaluation=say_evaluation(numbers),
        training=say_training(made),
        lerobot=NOT_LEROBOT.format(reasons="; ".join(reasons)) if reasons else LEROBOT.format(repo_id=repo_id),
        repo_id=repo_id,
        overrides=overrides,
        env=name_env(made, numbers),
    )
    return f"---\n{data}\n---\n\n{text}"
