"""What the command lines share."""

import argparse
import contextlib
import errno
import importlib.util
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from blipds import distributed
from blipds.chatter import CHATTER
from blipds.config.run import load_run_config
from blipds.config.sections import Config
from blipds.errors import UserError
from blipds.files.paths import user_path
from blipds.models.weights import fill_image_statistics
from blipds.monitor import Monitor, NullMonitor
from blipds.signals import REQUEUE, Stopped


def run(main: Callable[[], None]) -> None:
    """Runs a command. What the user can mend is one line on stderr and exit status 1, Ctrl-C is 130.

    So is standard output on a full disk; where nobody reads it any more (`| head`), the status is a shell's, 141.
    Other signals to stop are REQUEUE; while it trains, `Trainer.train` saves first. A bug's traceback is shown once, by
    the rank that met it first, and no rank outlives it. Warnings of libraries go to the run's log file.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a caption may have letters that the locale has not
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: leave(REQUEUE))
    try:
        with CHATTER:
            main()
        print(end="", flush=True)
    except UserError as error:
        if distributed.rank() != 0:
            # If rank 0 failed alike it has said so, and the launcher ends this rank while it waits.
            time.sleep(5)
        where = f" (rank {distributed.rank()})" if distributed.rank() else ""
        if distributed.first_to_fail():
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        leave(1)
    except Stopped as stopped:
        if distributed.is_main():
            print(stopped, file=sys.stderr, flush=True)
        leave(REQUEUE)
    except KeyboardInterrupt:
        if distributed.rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        leave(130)
    except Exception as error:
        first = distributed.first_to_fail()
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC) and not stdout_takes():
            if first and error.errno == errno.ENOSPC:
                print(f"error: standard output cannot be written: {error}", file=sys.stderr, flush=True)
            leave(141 if error.errno == errno.EPIPE else 1)
        if first:  # the others fail because this rank is gone: gloo says so at length
            said = f"{CHATTER.unwritten()}{traceback.format_exc()}"
            print(f"rank {distributed.rank()} failed:\n{said}", file=sys.stderr, flush=True)
        leave(1)
    distributed.shut_down()


def start_ranks(module: str) -> None:
    """Replaces this process by DeepSpeed's launcher with a rank of `module` for each GPU, where there are several.

    RANKS asks for another number, on CPUs too. Returns in a rank of another launcher, and where one rank is enough.
    """
    distributed.take_launcher_names()
    given = os.environ.get("RANKS", "")
    device = distributed.device_type()
    ranks = int(given) if given.isdigit() else torch.cuda.device_count() if device == "cuda" else 1
    if ranks > 1 and "RANK" not in os.environ:
        if device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # else the launcher warns that it found nothing else
        number = ["--num_accelerators", given] if given else []  # without it CUDA_VISIBLE_DEVICES counts
        words = ["--quiet", *number, "--master_port", str(distributed.free_port()), "--module", module]
        os.execv(sys.executable, [sys.executable, "-m", "deepspeed.launcher.runner", *words, *sys.argv[1:]])


def leave(status: int) -> None:
    """Ends this process at once: an orderly shutdown would wait for ranks that may never come."""
    with contextlib.suppress(OSError):
        print(end="", flush=True)
    sys.stderr.flush()
    os._exit(status)


def stdout_takes() -> bool:
    """Whether an empty line can still be printed."""
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def add_config_arguments(parser: argparse.ArgumentParser, default: str = "") -> None:
    """`default`: the run config that --cfg-path stands for where it may be left out."""
    text = "run config, or the name of one of run_configs/" + (default and f"; default: {default}")
    parser.add_argument("--cfg-path", type=Path, required=not default, metavar="YAML", help=text)
    add_override_arguments(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configs and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", metavar="PATH", help="the weights that adapters adapt, if not where they say (model.lora.base)"
    )


class ListEverything(argparse.Action):
    """`--list`: prints what there is to choose from, with what the plugins before it on the command line add."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        from blipds.catalogue import catalogue

        import_plugins(namespace.plugin)
        print("\n".join(catalogue()), flush=True)
        parser.exit()


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the run config, e.g. run.max_epoch=1 env.cache_root=/data",
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers models, datasets, processors, schedules or objectives of your own",
    )


def import_plugins(plugins: Sequence[str]) -> None:
    sys.path.insert(0, str(Path.cwd()))
    for plugin in plugins:
        try:
            importlib.import_module(plugin)
        except ImportError as error:
            raise UserError(f"--plugin {plugin}: {error}") from error


def load_config(args: argparse.Namespace) -> Config:
    """Imports the plugins and loads the run config; rank 0 says which of its keys something else decides now."""
    import_plugins(args.plugin)
    base = [f"model.lora.base={args.base}"] if getattr(args, "base", None) else []
    config, notices = load_run_config(args.cfg_path, [*args.options, *base])
    cache_root = user_path(config.env.cache_root)
    if os.path.expanduser("~") == "~":  # noqa: PTH111 (torch and the hub would make a folder of that name)
        os.environ["HOME"] = str(cache_root.absolute())
    if not config.datasets:
        raise UserError(f"{args.cfg_path}: the section datasets names none")
    if distributed.is_main():
        for notice in notices:
            print(f"not used: {notice}")
    for line in fill_image_statistics(config):
        if distributed.is_main():
            print(line)
    return config


def as_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def keep_config(config: Config, run_dir: Path) -> None:
    """Writes config.yaml where there is none yet: an evaluation in a run's own directory leaves the run's."""
    path = run_dir / "config.yaml"
    if not path.exists():
        path.write_text(as_yaml(config), encoding="utf-8")


def as_json(section: dict[str, Any]) -> str:
    return json.dumps(section, indent=2) + "\n"


def open_run_dir(config: Config, resumed: Path | None = None, restart: bool = False) -> Path:
    """Makes `run.output_dir`/<job id>, the same on every rank. Collective.

    Never continues an existing run unless asked to. `restart`: a run without any checkpoint may start again. UserError
    where it cannot be written to: nothing has been read or built by then.
    """
    job_id = config.run.job_id or distributed.broadcast(time.strftime("%Y%m%d-%H%M%S"))
    run_dir = resumed.parent.parent if resumed else user_path(config.run.output_dir) / job_id  # RUN/checkpoints/step_N
    problem = None
    if distributed.is_main():
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if not (resumed or restart) and any(run_dir.iterdir()):
                problem = (
                    f"{run_dir} holds a run already: give another run.job_id, or go on: finetune.py --resume {run_dir}"
                )
            with tempfile.TemporaryFile(dir=run_dir):
                pass
        except OSError as error:
            problem = f"run.output_dir: {run_dir} cannot be written to ({error})"
        for name in config.run.trackers:
            if importlib.util.find_spec(name) is None:
                problem = f"run.trackers: {name} is not installed: pip install {name}"
    if problem := distributed.broadcast(problem):
        raise UserError(problem)
    CHATTER.open(run_dir)
    return run_dir


def open_monitor(
    config: Config, run_dir: Path, resume_step: int | None = None, awaited_step: int | None = None
) -> Monitor:
    """Rank 0's monitor, with the trackers of the run config; of other ranks, one that does nothing."""
    kind = Monitor if distributed.is_main() else NullMonitor
    return kind(run_dir, resume_step, awaited_step, config.run.trackers, asdict(config))
