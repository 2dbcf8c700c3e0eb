"""TFDS builders whose finished shards outlive a kill.

A prepared source is a TFDS folder, `<data_dir>/<corpus>/<source>/<version>`, with a manifest beside
TFDS's own files. Shards that were finished before a program was stopped wait next to it, and are
not made again. A folder appears under its name only when it is whole.
"""

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from filelock import FileLock, Timeout
from google.protobuf import json_format
from tqdm import tqdm

from colbert_jax.data.records import MANIFEST_FILE, read_manifest
from colbert_jax.data.shards import (
    Job,
    Shard,
    Summary,
    finished,
    shard_path,
    write_durably,
    write_shard,
    write_with_beam,
)
from colbert_jax.errors import UserError

_logger = logging.getLogger(__name__)


class _OwnInfo(tfds.core.DatasetInfo):
    """TFDS's description of a data set, of which nobody else keeps another."""

    def initialize_from_bucket(self) -> None:
        """Asks nobody; TFDS would leave an empty temporary folder behind each time."""


class ShardedBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder whose finished shards outlive a kill, with Beam or without."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data_dir: str | Path, config: Any = None):
        try:
            with _quiet():
                super().__init__(data_dir=str(data_dir), config=config, file_format="array_record")
        except json_format.ParseError as error:
            name = config if isinstance(config, str) else config.name
            raise UserError(
                f"{Path(data_dir) / self.name / name} is damaged ({error}): remove it, so that it "
                "is prepared anew."
            ) from None
        self.folder = Path(self.data_dir)
        self._show_after_seconds = 0.0
        self.unfinished = self.folder.parent / f".{self.folder.name}.unfinished"

    def _info(self) -> tfds.core.DatasetInfo:
        return _OwnInfo(builder=self, features=self.get_features())

    def get_features(self) -> tfds.features.FeaturesDict:
        """The columns of a record."""
        raise NotImplementedError

    def request(self, resolved: bool) -> dict[str, Any]:
        """What is asked for: what finished shards, or a prepared folder, must have been made of.

        Args:
          resolved: whether every value is wanted; otherwise those that are left open are None.
        """
        raise NotImplementedError

    def check_request(self, was: dict[str, Any]) -> None:
        """Raises `UserError` if a prepared folder is not what is asked for."""
        check_same(was, self.request(resolved=False), self.folder)

    def open_job(self) -> tuple[Job, dict[str, Any]]:
        """The shards to write, and what the manifest says beside their sums."""
        raise NotImplementedError

    def prepare(
        self,
        beam_runner: str | None = None,
        beam_options: Any = None,
        *,
        wait: bool = False,
        show_after_seconds: float = 0.0,
    ) -> dict[str, Any]:
        """Prepares the folder, unless it is there; goes on where an earlier preparation stopped.

        Args:
          beam_runner: a Beam runner's name; None writes the shards in this process.
          beam_options: Beam's `PipelineOptions`, for a runner.
          wait: whether to wait for another preparation of the folder to end.
          show_after_seconds: how long no progress bar is drawn.

        Returns:
          The manifest.

        Raises:
          UserError: data that cannot be read, a folder that cannot be written, another preparation
            of it under way, or one that was asked for otherwise.
        """
        self._show_after_seconds = show_after_seconds
        if self.is_prepared():
            self._tidy()  # in vain where the disk cannot be written
            return self._checked_manifest()
        lock = FileLock(self.folder.parent / ".lock")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise
                _logger.info("waiting for another preparation of %s", self.folder)
                lock.acquire()
            try:
                if not self.is_prepared():  # it may be, by the one that was waited for
                    self.download_and_prepare(
                        download_config=tfds.download.DownloadConfig(
                            beam_runner=beam_runner, beam_options=beam_options
                        )
                    )
            finally:
                lock.release()
        except Timeout:
            raise UserError(
                f"Another preparation of {self.folder.parent} is under way: wait for it, or choose "
                "another folder."
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror or error}): make room there, or "
                "choose another folder."
            ) from error
        return self._checked_manifest()

    def download_and_prepare(self, **kwargs: Any) -> None:
        """TFDS's own way to prepare; `prepare` says in one sentence what goes wrong."""
        with _quiet():
            super().download_and_prepare(**{"download_dir": str(self.unfinished)} | kwargs)
        self._tidy()

    def _tidy(self) -> None:
        """Removes what killed programs left of a source that is prepared now."""
        for stale in [*self.folder.parent.glob("incomplete.*"), self.unfinished]:
            if stale.exists():
                shutil.rmtree(stale, ignore_errors=True)

    def _checked_manifest(self) -> dict[str, Any]:
        manifest = read_manifest(self.folder)
        self.check_request(manifest["request"])
        return manifest

    def is_prepared(self) -> bool:
        """Whether the folder is there, and whole."""
        return (self.folder / MANIFEST_FILE).is_file()

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        request = self.request(resolved=True)
        self._open_unfinished(request)
        job, told = self.open_job()
        todo = [shard for shard in job.shards if finished(self.unfinished, shard) is None]
        if len(todo) < len(job.shards):
            _logger.info(
                "going on: %d of %d shards are written",
                len(job.shards) - len(todo),
                len(job.shards),
            )
        if download_config is not None and download_config.beam_runner:
            write_with_beam(job, todo, self.unfinished, download_config)
        else:
            self._write_here(job, todo)
        self._publish(job, request, told)

    def _open_unfinished(self, request: dict[str, Any]) -> None:
        """Keeps what an earlier preparation of the same finished, and throws away all else."""
        note = self.unfinished / "request.json"
        kept = None
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(note.read_text(encoding="utf-8"))
        if kept != json.loads(json.dumps(request)):
            note.unlink(missing_ok=True)  # before what it vouches for
            if self.unfinished.exists():
                shutil.rmtree(self.unfinished)
            self.unfinished.mkdir(parents=True)
            write_durably(note, json.dumps(request))

    def _write_here(self, job: Job, todo: Sequence[Shard]) -> None:
        total = sum(shard.rows for shard in job.shards)
        done = total - sum(shard.rows for shard in todo)
        with self.bar(total, initial=done) as bar:
            for shard in todo:
                write_shard(job, shard, self.unfinished, bar.update)

    def label(self) -> str:
        """What the source is called on the screen."""
        return f"{self.name}/{self.builder_config.name}"

    def bar(self, rows: int, what: str = "", initial: int = 0) -> tqdm:
        """A progress bar over rows."""
        return tqdm(
            total=rows,
            initial=initial,
            desc=f"{self.label()}{what}",
            unit="row",
            unit_scale=True,
            dynamic_ncols=True,
            delay=self._show_after_seconds,
        )

    def _publish(self, job: Job, request: dict[str, Any], told: dict[str, Any]) -> None:
        """Moves the shards into TFDS's folder, which is still under another name, and sums up."""
        total, shards = Summary(), []
        for shard in job.shards:
            summary = finished(self.unfinished, shard)
            assert summary is not None
            total.add(summary, f"{self.folder}, shard {shard.number}")
            if summary["kept"]:
                shards.append((shard, summary))
        if not shards:
            why = "; ".join(total.first_dropped.values())
            raise UserError(
                f"{self.folder}: none of {total.read} rows can be used"
                + (f" (the first: {why})." if why else ": give a source that has some.")
            )
        template = self._get_filename_template(split_name="train")
        files = []
        for index, (shard, summary) in enumerate(shards):
            path = Path(template.sharded_filepath(shard_index=index, num_shards=len(shards)))
            _link(shard_path(self.unfinished, shard), path)
            about = {key: summary[key] for key in ("kept", "bytes", "sha256", "rows_sha256")}
            files.append({"name": path.name} | about)
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[file["kept"] for file in files],
            num_bytes=sum(file["bytes"] for file in files),
            filename_template=template,
        )
        self.info.set_splits(tfds.core.splits.SplitDict([split]))
        manifest = total.to_json() | told | {"request": request, "shards": files}
        write_durably(Path(self.data_dir) / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")

    def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
        raise NotImplementedError  # TFDS's way, which would begin anew after a kill


def _link(path: Path, to: Path) -> None:
    """A second name for a file, so that it outlives a failure of what comes next."""
    try:
        to.hardlink_to(path)
    except OSError:  # some file systems have no such names
        path.rename(to)


def check_same(was: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """Raises `UserError`, naming the first value that is asked for otherwise; None asks nothing."""
    asked = json.loads(json.dumps(asked))
    for key in sorted(was.keys() | asked.keys()):
        if was.get(key) != asked.get(key) and asked.get(key) is not None:
            raise UserError(
                f"{folder} was prepared with {key}={was.get(key)!r}, not {asked.get(key)!r}: "
                "remove it, or choose another folder."
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's own announcements off the screen; what a user needs is said here."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
