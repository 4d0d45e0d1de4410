"""Check a config against the dataset that it names: observations, pictures, episodes, time."""

from __future__ import annotations

from collections.abc import Iterator

from getiaction.config.build import build_mirror, observation_keys
from getiaction.config.checks import check_crop, check_sight
from getiaction.config.problems import Problem, report
from getiaction.config.schema import Config
from getiaction.data.metadata import DatasetMetadata
from getiaction.data.mixture import Mixture
from getiaction.data.windows import check_delta_timestamps
from getiaction.errors import InputError
from getiaction.keys import ACTION, is_camera
from getiaction.training.validation import sources_of, spread


def check_dataset(config: Config, mixture: Mixture) -> None:
    """Check the config against what the dataset says of itself, or the datasets.

    Raises:
        InputError: all errors, one a line; with `strict`, warnings too.
    """
    metadata = mixture.metadata
    report([*check_observations(config, metadata), *check_episodes(mixture)], strict=config.strict)
    report(list(check_agreement(config, mixture)), strict=config.strict)
    report([*check_mirror(config, metadata), *check_samples(config, mixture)], strict=config.strict)
    if config.dataset.delta_timestamps:
        unknown = [key for key in config.dataset.delta_timestamps if key not in metadata.features]
        if unknown:
            raise InputError(
                f"dataset.delta_timestamps names {', '.join(unknown)}; the dataset has {', '.join(metadata.features)}"
            )
        policy = config.policy
        check_delta_timestamps(
            config.dataset.delta_timestamps, n_obs_steps=policy.n_obs_steps, horizon=policy.horizon, fps=metadata.fps
        )


def check_agreement(config: Config, mixture: Mixture) -> Iterator[Problem]:
    """Check that all datasets have what the policy uses, and none of their episodes is there twice."""
    keys = [*observation_keys(config, mixture.metadata), ACTION]
    disagreements = list(mixture.disagreements(keys))
    common = [key for key in keys if key != ACTION and not any(f" {key}:" in line for line in disagreements)]
    if disagreements and common and len(common) < len(keys) - 1:
        disagreements.append(f"what all of them have is dataset.observations='[{','.join(common)}]'")
    yield from map(Problem, (*disagreements, *mixture.overlaps()))
    if not disagreements:
        yield from (Problem(line, is_error=False) for line in mixture.other_names(keys))


def check_observations(config: Config, metadata: DatasetMetadata) -> Iterator[Problem]:
    """Check that the observations exist, and that the crop fits their pictures."""
    has = [key for key in (*metadata.cameras, *metadata.vectors) if key != ACTION]
    chosen = config.dataset.observations
    if chosen is not None and (unknown := sorted(set(chosen) - set(has))):
        yield Problem(f"dataset.observations={unknown} are not in {metadata.root}: choose from {sorted(has)}")
        return
    used = chosen if chosen is not None else [key for key in has if config.uses_images or not is_camera(key)]
    cameras = {key: metadata.cameras[key] for key in used if is_camera(key)}
    if cameras and not config.uses_images:
        yield Problem(
            f"backbone=none cannot see dataset.observations={sorted(cameras)}: use backbone=resnet18, or leave them out"
        )
    if config.uses_images and not cameras:
        yield Problem(f"the backbone needs a camera and none of {sorted(used)} is one: use backbone=none")
    if not used:
        yield Problem(f"{metadata.root} has no observation that backbone=none can use: use backbone=resnet18")
    if coloured := [key for key, shape in cameras.items() if shape[0] != 3]:
        yield Problem(f"{coloured} do not have 3 channels: leave them out of dataset.observations")
    if len(set(cameras.values())) > 1:
        yield Problem(f"all cameras must have one shape, got {cameras}: choose some with dataset.observations")
    elif cameras and not config.backbone.get("resize_shape"):
        _, height, width = next(iter(cameras.values()))
        crop = config.backbone.get("crop_shape")
        yield from check_crop(crop, [height, width], "the recorded picture")
        if config.uses_images and not crop:
            yield from check_sight([height, width], "backbone.resize_shape=[96,96]")


def check_mirror(config: Config, metadata: DatasetMetadata) -> Iterator[Problem]:
    """Check that the mirror knows every feature of the policy, and has its size."""
    mirror = build_mirror(config)
    if mirror is None:
        return
    used = observation_keys(config, metadata)
    if missing := mirror.missing(used):
        yield Problem(
            f"mirror says nothing of {', '.join(missing)}, which the policy uses: add an entry to mirror.features, "
            "leave it out with dataset.observations, or use mirror=none"
        )
        return
    for key in (*used, ACTION):
        entry = mirror.features[key]
        if not is_camera(key) and len(entry["order"]) != metadata.vectors[key]:
            yield Problem(
                f"mirror.features.{key}.order has {len(entry['order'])} places, the dataset's {key} has "
                f"{metadata.vectors[key]}: this mirror is for other data; use mirror=none"
            )
        if is_camera(key) and mirror.source(key) not in used:
            yield Problem(
                f"mirror.features.{key}.source={mirror.source(key)} is not observed: add it, or use mirror=none"
            )
        shape = config.backbone.get("crop_shape") or config.backbone.get("resize_shape")
        if is_camera(key) and entry.get("transpose"):
            height, width = shape or metadata.cameras[key][1:]
            if height != width:
                yield Problem(
                    f"mirror.features.{key}.transpose needs square pictures, the policy sees {height}x{width}: use a "
                    "square backbone.crop_shape, or mirror=none"
                )


def check_episodes(mixture: Mixture) -> Iterator[Problem]:
    """Check that the chosen episodes exist, each once."""
    for source in mixture.sources:
        indices = source.metadata.episode_indices
        for name, chosen in (("episodes", source.episodes), ("val_episodes", source.val_episodes)):
            if chosen is None:
                continue
            if missing := sorted(set(chosen) - set(indices)):
                yield Problem(
                    f"{source.key}.{name}={missing} do not exist: {source.metadata.root} has episodes {indices[0]} to "
                    f"{indices[-1]}"
                )
            if len(set(chosen)) < len(chosen):
                twice = {index for index in chosen if chosen.count(index) > 1}
                yield Problem(f"{source.key}.{name} names {sorted(twice)} twice: name each episode once")
        if source.episodes is not None and not source.episodes:
            yield Problem(f"{source.key}.episodes=[] leaves nothing to train on: use null for all episodes")


def check_samples(config: Config, mixture: Mixture) -> Iterator[Problem]:
    """Check that what is left to train on, and what is held out, is long enough for a sample, and that it is seen."""
    dropped = config.drop_n_last_frames
    splits = mixture.splits(config.dataset.val_fraction, config.seed)
    yield from check_validation(config, mixture, [held_out for _, held_out in splits])
    for source, (training, held_out) in zip(mixture.sources, splits, strict=True):
        for purpose, indices in (("to train on", training), ("held out", held_out)):
            rows = source.metadata.rows_of(indices)
            if rows and all(row["length"] <= dropped for row in rows):
                yield Problem(
                    f"none of the {len(rows)} episodes {purpose} of {source.key} ({source.metadata.root}) is longer "
                    f"than policy.drop_n_last_frames={dropped}: lower it, or choose other episodes"
                )


def check_validation(config: Config, mixture: Mixture, held_out: list[list[int]]) -> Iterator[Problem]:
    """Check that each source that holds episodes out has samples in the validation loss, so that its own is measured.

    Args:
        held_out: episodes of each source, in its own numbers.
    """
    most = config.validation.max_samples
    frames = [
        [int(row["length"]) for row in s.metadata.rows_of(e)] for s, e in zip(mixture.sources, held_out, strict=True)
    ]
    counts = tuple(sum(max(length - config.drop_n_last_frames, 0) for length in lengths) for lengths in frames)
    seen = sources_of(spread(sum(counts), most), counts) if sum(counts) else {}
    for number, (source, count) in enumerate(zip(mixture.sources, counts, strict=True)):
        if count and number not in seen:
            yield Problem(
                f"validation.max_samples={most} of the {sum(counts)} held-out samples leave none of the {count} of "
                f"{source.key} ({source.metadata.root}), so there is no val_loss_{number}: use "
                f"validation.max_samples={-(-sum(counts) // count)}, or more",
                is_error=False,
            )
