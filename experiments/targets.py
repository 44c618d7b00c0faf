"""What a stage's units come from: a store of labels, or the step itself."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from data_pipelines.manifest import Manifest
from data_pipelines.units import UnitStore
from experiments.trained import load_encoder
from experiments.units import UnitFiles, UnitsConfig, check_layer, fitted_centroids, made_from, make_units
from wavlab_jax.encoder import formulation_for
from wavlab_jax.targets.online import OnlineSet, Targets, make_targets
from wavlab_jax.targets.random_projection import RandomProjectionConfig, random_projection
from wavlab_jax.targets.teacher import mfcc_units, teacher_units

UnitSetConfig = UnitsConfig | RandomProjectionConfig


class Labels(NamedTuple):
    """What a stage trains on.

    Attributes:
        stores: of the sets that are read from disk, in order; what the pipeline is given.
        targets: fill in the others; None if there are none.
        sources: what made each set, JSON.
    """

    stores: list[UnitStore]
    targets: Targets | None
    sources: list[str]


def is_online(cfg: UnitSetConfig) -> bool:
    """Whether these units are computed in the step."""
    return isinstance(cfg, RandomProjectionConfig) or cfg.online


def make_labels(
    sets: Sequence[UnitSetConfig], workdir: Path, manifest: Manifest, mesh: Mesh, *, stored: bool = False
) -> Labels:
    """Stores loaded or made, centroids loaded or fitted, projections drawn.

    `stored`: stores must be there already, as in evaluation: UnitsError then if one is not.
    """
    stores, online, sources = [], [], []
    for cfg in sets:
        if is_online(cfg):
            online.append(_online(cfg, workdir, manifest, mesh))
            sources.append(_source(cfg, workdir, manifest))
            continue
        if stored:
            stores.append(UnitStore.load(UnitFiles(workdir, cfg.name).store, manifest))
        else:
            stores.append(make_units(cfg, workdir, manifest, mesh))
        online.append(None)
        sources.append(stores[-1].source)
    return Labels(stores, make_targets(online, mesh), sources)


def _online(cfg: UnitSetConfig, workdir: Path, manifest: Manifest, mesh: Mesh) -> OnlineSet:
    if isinstance(cfg, RandomProjectionConfig):
        return random_projection(cfg)
    centers = fitted_centroids(cfg, workdir, manifest, mesh)
    if cfg.teacher is None:
        return mfcc_units(centers)
    encoder = load_encoder(workdir, cfg.teacher, mesh)
    check_layer(cfg, encoder)
    formulation = formulation_for(mesh.devices.flat[0].platform)
    return teacher_units(encoder, np.asarray(centers), layer=cfg.layer, formulation=formulation)


def _source(cfg: UnitSetConfig, workdir: Path, manifest: Manifest) -> str:
    if isinstance(cfg, RandomProjectionConfig):
        return json.dumps({"random_projection": dataclasses.asdict(cfg), "name": cfg.name})
    return json.dumps({**json.loads(made_from(cfg, workdir, manifest)), "online": True})
