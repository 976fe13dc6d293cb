"""The only reader of the process environment, and the list of what Penstock reads.

Everybody else takes values as arguments. `read_environment` is called by the command line and by
process entry points, once; the result is frozen.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.base.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")

VARIABLES: Mapping[str, str] = {
    "PENSTOCK_STATE_DIR": "where running clusters are noted; default "
    "$XDG_STATE_HOME/penstock, else ~/.local/state/penstock",
    "PENSTOCK_CACHE_DIR": "where compiled CPU kernels are kept; default "
    "$XDG_CACHE_HOME/penstock, else ~/.cache/penstock",
    "PENSTOCK_LOG_LEVEL": f"one of {', '.join(LOG_LEVELS)}; default info",
    "PENSTOCK_API_KEY": "API key that commands send to a gateway",
    "CUDA_VISIBLE_DEVICES": "GPUs that may be used, as CUDA reads it; default all",
    "HF_HOME": "cache of downloaded models, read by huggingface_hub",
    "HF_HUB_OFFLINE": "1: never download models, read by huggingface_hub",
    "TRITON_INTERPRET": "1: Triton's kernels run in its interpreter on the CPU, for tests",
    "NO_COLOR": "any value: no colours on the terminal, read by rich",
}
"""Name -> meaning of every variable that has an effect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the process environment says."""

    state_dir: Path
    log_level: str
    cuda_visible_devices: str | None
    """None: unset, all devices. Empty: none."""
    hub_offline: bool
    api_key: str | None = field(default=None, repr=False)


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read the environment (or the given stand-in for it).

    Raises:
        ConfigError: PENSTOCK_LOG_LEVEL is not a level, or no home directory can be found.
    """
    env = os.environ if variables is None else variables
    level = env.get("PENSTOCK_LOG_LEVEL", "").lower() or "info"
    if level not in LOG_LEVELS:
        raise ConfigError(
            "PENSTOCK_LOG_LEVEL is not a log level.",
            f"Use one of {', '.join(LOG_LEVELS)}.",
            param="PENSTOCK_LOG_LEVEL",
        )
    return Environment(
        state_dir=_state_dir(env),
        log_level=level,
        cuda_visible_devices=env.get("CUDA_VISIBLE_DEVICES"),
        hub_offline=env.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"},
        api_key=env.get("PENSTOCK_API_KEY") or None,
    )


def default_cache_dir(variables: Mapping[str, str] | None = None) -> Path:
    """Where things are kept that can be made again; in the system's temporary files at worst."""
    env = os.environ if variables is None else variables
    if own := env.get("PENSTOCK_CACHE_DIR"):
        return Path(own).absolute()
    if base := env.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "penstock"
    try:
        home = Path(env["HOME"]) if env.get("HOME") else Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}"
    return home / ".cache" / "penstock"


def _state_dir(env: Mapping[str, str]) -> Path:
    if own := env.get("PENSTOCK_STATE_DIR"):
        return Path(own).absolute()
    if base := env.get("XDG_STATE_HOME"):
        return Path(base).absolute() / "penstock"
    try:
        home = Path(env["HOME"]) if env.get("HOME") else Path.home()
    except RuntimeError:
        raise ConfigError(
            "No home directory for the state of clusters.",
            "Set PENSTOCK_STATE_DIR.",
            param="PENSTOCK_STATE_DIR",
        ) from None
    return home / ".local" / "state" / "penstock"


RAY_DEFAULTS: Mapping[str, str] = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
}
"""What Ray is to read from its environment, here and in pods. It starts its workers at nice +15,
which starves a serving process on a shared machine. The others: Ray looks after an idle cluster ten
times a second, for 15 % of a core and 2500 switches of it, and the threads between two tokens need
those. Nothing that a request waits for is among them; a new replica may be noticed half a second
later."""


def set_ray_defaults() -> None:
    """Set what Ray reads from the environment of the process that starts it, unless the user did.

    A client shows the user's Ray token only in token mode, which Ray itself switches on for
    `ray start` but not for who joins later.
    """
    if (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)


def ray_token_auth() -> bool:
    """Whether Ray runs with token authentication (it says so in RAY_AUTH_MODE itself)."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def triton_interpreter() -> bool:
    """Whether Triton was told to interpret its kernels (it reads TRITON_INTERPRET itself)."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def set_lone_rank() -> None:
    """Set what DeepSpeed wants to read in a process that nobody launched as one of several."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
