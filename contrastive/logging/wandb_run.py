"""Use Weights & Biases without Lightning: start a run, log the encoder as an artifact, survive failures.

One pretraining is one W&B run of ``job_type=pretrain``. Its id is in the run directory's config.yaml, so
that a resume continues it. Each evaluation is a run of its own (``job_type`` is its protocol) in the same
group, which consumes the encoder that the pretraining logged as an artifact.
"""

import contextlib
import importlib.util
import netrc
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from contrastive.config import UserError, WandbConfig, first_line

_INIT_TIMEOUT_S = 30.0  # for the first answer of the W&B server


def start_run(
    settings: WandbConfig, run_dir: Path, *, pretrain_id: str, quiet: bool = False, **arguments: Any
) -> Any:
    """Start (or, with the ``id`` of an earlier one, continue) a W&B run; None when W&B is off.

    Mode ``auto`` is ``WANDB_MODE`` if set, else online where credentials are found (without asking or using
    the network), else off with a line on stderr. When W&B cannot be reached, the run continues offline, with
    a line on stderr. All files are written below ``run_dir/wandb``.

    Args:
        settings: Mode, project, entity, tags.
        run_dir: The run directory.
        pretrain_id: W&B id of the pretraining; it and the evaluations of its encoder are one group.
        quiet: Print nothing if ``auto`` means off, and leave out W&B's own lines, about 35 of a run.
        arguments: Further arguments of ``wandb.init``: name, id, job_type, config.

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
        quiet=quiet,
        **arguments,
    )


def describe_run(run: Any) -> str:
    """Say where a run is, and if it is offline how to upload it."""
    if not run.offline:
        return f"W&B: {run.url}"
    return f"W&B: offline run, to upload it: wandb sync {shlex.quote(str(Path(run.dir).parent))}"


def log_encoder(run: Any, encoder: Path, name: str, metadata: Mapping[str, Any]) -> None:
    """Log ``encoder`` (an ``encoder.safetensors``) as an output artifact of ``run``."""
    with forgiving("the encoder's artifact"):
        run.log_artifact(_artifact(encoder, name, metadata))


def use_encoder(run: Any, encoder: Path, name: str) -> None:
    """Declare ``encoder`` as an input artifact of ``run``.

    W&B identifies artifacts by name and content: it does not store a second version of the file that the
    pretraining logged, but links the two runs, wherever the file is now.
    """
    with forgiving("the link to the encoder's artifact"):
        artifact = _artifact(encoder, name, {})
        if not run.offline:
            run.use_artifact(artifact)
        else:
            # use_artifact refuses to work offline, although it only sends a record that `wandb sync`
            # understands; so write the record directly.
            run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def encoder_name(pretrain_id: str, checkpoint: str = "") -> str:
    """Return the artifact name of a pretraining's encoder, or of that in a checkpoint (``step-N``)."""
    return "-".join(["encoder", pretrain_id, *([checkpoint] if checkpoint else [])])


def _artifact(encoder: Path, name: str, metadata: Mapping[str, Any]) -> Any:
    import wandb

    artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
    artifact.add_file(str(encoder), name=encoder.name)
    return artifact


@contextlib.contextmanager
def forgiving(what: str, failed: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Run W&B calls; on failure print one line that names what was lost, and call ``failed``.

    An OSError means a full disk, or that W&B's service process ended, e.g. killed for lack of memory.
    """
    import wandb

    try:
        yield
    except (wandb.errors.Error, OSError) as error:
        reason = first_line(error)
        _say(f"W&B: {what} is missing ({reason}); everything else continues")
        failed()


def _wandb_mode(mode: str, quiet: bool = False) -> str:
    """Return ``online``, ``offline`` or ``disabled``: resolve ``auto``, check the others."""
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
    """Return why W&B cannot be used in ``mode`` and what to do, None if it can; never prompts."""
    if importlib.util.find_spec("wandb") is None:
        return "the package is not installed, run 'pip install wandb'"
    if mode != "offline" and not _wandb_credentials():
        return "not logged in, run 'wandb login' or set WANDB_API_KEY"
    return None


def _wandb_credentials() -> bool:
    """Return whether wandb would find an API key; its own functions for this differ by version."""
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
    # Newer releases use another default host, and also accept the key of the old one.
    return {urlsplit(str(wandb.Settings().base_url)).netloc, "api.wandb.ai"}


def _in_netrc(hosts: set[str]) -> bool:
    own = os.environ.get("NETRC")
    candidates = [Path(own)] if own else [Path("~/.netrc"), Path("~/_netrc")]
    for path in candidates:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if hosts & netrc.netrc(path.expanduser()).hosts.keys():
                return True
    return False


def _start_wandb(mode: Any, quiet: bool, **arguments: Any) -> Any:
    import wandb

    folder = Path(arguments["dir"]) / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    # Logs of its service process and staged files, which would otherwise be below $HOME.
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder / "cache"))
    settings = wandb.Settings()
    patient_s = settings.init_timeout
    if mode != "offline":
        settings.init_timeout = _INIT_TIMEOUT_S
    if hasattr(settings, "finish_timeout"):  # not in early releases
        settings.finish_timeout = 300.0
    if quiet:
        settings.quiet = True  # no history and summary
        settings.silent = mode == "offline"  # online, a failed upload must be told
    with _children_print_to_stderr():
        try:
            return wandb.init(mode=mode, settings=settings, **arguments)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            if mode == "offline":
                raise
            reason = first_line(error)
            _say(f"W&B cannot be reached ({reason}); continuing offline; later: wandb sync {folder}/off*")
            wandb.teardown()  # else the run id stays in use
            settings.init_timeout = patient_s  # now it waits for W&B's own process alone
            return wandb.init(mode="offline", settings=settings, **arguments)


@contextlib.contextmanager
def _children_print_to_stderr() -> Iterator[None]:
    """Send the stdout of processes started here to stderr: W&B's service prints, stdout is for results."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def _say(message: str) -> None:
    print(message, file=sys.stderr)
