"""Weights & Biases without Lightning: starting a run, the encoder's artifact, and what to do when it fails.

One pretraining is one W&B run of ``job_type=pretrain``, whose id is in the run directory's config.yaml, so
that a resume goes on with it. Each evaluation is a run of its own (``job_type`` is its protocol) in the same
group, which consumes the encoder that the pretraining logged as an artifact.
"""

import contextlib
import importlib.util
import netrc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from contrastive.config import UserError, WandbConfig

_INIT_TIMEOUT_S = 30.0  # for the first answer of the W&B server


def start_run(
    settings: WandbConfig, run_dir: Path, *, pretrain_id: str, quiet: bool = False, **arguments: Any
) -> Any:
    """Start (or, with the ``id`` of an earlier one, continue) a W&B run; None when W&B is off.

    Mode ``auto`` is ``WANDB_MODE`` if set, else online where credentials are found (without asking or using
    the network), else off with a line on stderr. When W&B cannot be reached the run goes on offline, with a
    line on stderr. All files are written below ``run_dir/wandb``.

    Args:
        settings: Mode, project, entity, tags.
        run_dir: The run directory.
        pretrain_id: W&B id of the pretraining; it and the evaluations of its encoder are one group.
        quiet: Say nothing where ``auto`` means off.
        arguments: More of ``wandb.init``: name, id, job_type, config.

    Raises:
        UserError: ``online`` or ``offline`` without the package, ``online`` without credentials.
    """
    mode = _wandb_mode(settings.mode, quiet)
    if mode == "disabled":
        return None
    return _start_wandb(
        mode,
        project=settings.project,
        entity=settings.entity,
        tags=settings.tags or None,
        group=pretrain_id,
        resume="allow",
        dir=str(run_dir),
        **arguments,
    )


def log_encoder(run: Any, encoder: Path, name: str, metadata: Mapping[str, Any]) -> None:
    """Keep ``encoder`` (an ``encoder.safetensors``) as the output of ``run``."""
    with forgiving("the encoder's artifact"):
        run.log_artifact(_artifact(encoder, name, metadata))


def use_encoder(run: Any, encoder: Path, name: str) -> None:
    """Note ``encoder`` as the input of ``run``.

    W&B tells artifacts by name and content: it keeps no second version of what the pretraining logged, but
    links the two runs, wherever the file lies now.
    """
    with forgiving("the link to the encoder's artifact"):
        artifact = _artifact(encoder, name, {})
        if not run.offline:
            run.use_artifact(artifact)
        else:
            # use_artifact refuses to work offline, though what it sends is a record like any other, which
            # `wandb sync` understands; so the record is written without it.
            run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def encoder_name(pretrain_id: str, checkpoint: str = "") -> str:
    """Name of the artifact of a pretraining's encoder, or of that in one of its checkpoints (``step-N``)."""
    return "-".join(["encoder", pretrain_id, *([checkpoint] if checkpoint else [])])


def _artifact(encoder: Path, name: str, metadata: Mapping[str, Any]) -> Any:
    import wandb

    artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
    artifact.add_file(str(encoder), name=encoder.name)
    return artifact


@contextlib.contextmanager
def forgiving(what: str, failed: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Around a use of W&B: if it fails, a line says that ``what`` is missing, and ``failed`` is called.

    An OSError is a full disk, or the end of W&B's service process, which the system may kill for memory.
    """
    import wandb

    try:
        yield
    except (wandb.errors.Error, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _say(f"W&B: {what} is missing ({reason}); everything else goes on")
        failed()


def _wandb_mode(mode: str, quiet: bool = False) -> str:
    """``online``, ``offline`` or ``disabled``; ``auto`` is resolved, the others are checked."""
    if mode == "auto":
        mode = _environment_mode()
    if mode == "disabled":
        return mode
    problem = wandb_problem(mode)
    if problem is None:
        return "online" if mode == "auto" else mode
    if mode == "auto":
        if not quiet:
            _say(f"W&B is off: {problem}; or set logging.wandb.mode=offline, or =disabled to hide this line")
        return "disabled"
    raise UserError(f"W&B mode {mode!r}: {problem}; or set logging.wandb.mode=disabled")


def _environment_mode() -> str:
    mode = os.environ.get("WANDB_MODE", "auto").replace("dryrun", "offline")
    return mode if mode in ("online", "offline", "disabled") else "auto"


def wandb_problem(mode: str) -> str | None:
    """Why W&B cannot be used in ``mode`` and what to do, None if it can; nobody is asked."""
    if importlib.util.find_spec("wandb") is None:
        return "the package is not installed, run 'pip install wandb'"
    if mode != "offline" and not _wandb_credentials():
        return "not logged in, run 'wandb login' or set WANDB_API_KEY"
    return None


def _wandb_credentials() -> bool:
    """Whether wandb would find a key where it looks; its own functions for this differ by version."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = _wandb_settings_file()
    return "api_key" in settings or _in_netrc(_wandb_hosts(settings))


def _wandb_settings_file() -> Mapping[str, str]:
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    parser = ConfigParser(interpolation=None)
    with contextlib.suppress(ConfigParserError, OSError, UnicodeDecodeError):
        parser.read(folder / "settings")
    return dict(parser["default"]) if parser.has_section("default") else {}


def _wandb_hosts(settings: Mapping[str, str]) -> set[str]:
    import wandb

    if own := os.environ.get("WANDB_BASE_URL") or settings.get("base_url"):
        return {urlsplit(own).netloc}
    # Newer releases talk to another host by default and take the key of the classic one too.
    return {urlsplit(str(wandb.Settings().base_url)).netloc, "api.wandb.ai"}


def _in_netrc(hosts: set[str]) -> bool:
    own = os.environ.get("NETRC")
    candidates = [Path(own)] if own else [Path("~/.netrc"), Path("~/_netrc")]
    for path in candidates:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if hosts & netrc.netrc(path.expanduser()).hosts.keys():
                return True
    return False


def _start_wandb(mode: Any, **arguments: Any) -> Any:
    import wandb

    folder = Path(arguments["dir"]) / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    # Logs of its service process and staged files, which would be below $HOME.
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder / "cache"))
    settings = wandb.Settings(init_timeout=_INIT_TIMEOUT_S)
    if hasattr(settings, "finish_timeout"):  # not in early releases
        settings.finish_timeout = 300.0
    with _children_print_to_stderr():
        try:
            return wandb.init(mode=mode, settings=settings, **arguments)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            if mode == "offline":
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _say(f"W&B cannot be reached ({reason}); going on offline, for later: wandb sync {folder}/off*")
            wandb.teardown()  # or the run id stays in use
            return wandb.init(mode="offline", settings=settings, **arguments)


@contextlib.contextmanager
def _children_print_to_stderr() -> Iterator[None]:
    """Let processes started meanwhile have stderr for stdout: W&B's service prints, stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _say(message: str) -> None:
    print(message, file=sys.stderr)
