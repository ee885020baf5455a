"""Pretrained weights on this machine: those that a package carries, and those kept here once fetched or given.

What is kept is a safetensors file for each backbone and a record beside it: its sha256, where it came from, and the row
of the table where only another library knows that. A later load reads these alone: it needs no network, unpickles
nothing, and notices a damaged file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from fewshot_engine.checkpoints import write_atomically
from fewshot_engine.errors import CheckpointError, WeightsMissing

if TYPE_CHECKING:
    from torch import Tensor, nn

COMMAND = "python -m fewshot_engine weights"
TIMEOUT_S = 30
CHUNK = 1 << 20
NAMED_AT_MOST = 3  # tensors named in a complaint
WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training scripts put a state dict under


@dataclass(frozen=True)
class Record:
    """What is known about the weights that are kept for a backbone.

    Attributes:
        file: its name, beside the record.
        sha256: of that file.
        source: the address or the file it was made from, and that one's sha256.
        facts: size, normalisation and the like of a backbone that is not in the table.
    """

    name: str
    file: str
    sha256: str
    source: str
    source_sha256: str
    facts: dict[str, Any] = field(default_factory=dict)


def default_cache_dir() -> Path:
    """Where the engine keeps what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewshot-studio"


def find_record(name: str) -> Record | None:
    """What is kept for this backbone, if anything; the file itself is not looked at.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = _record_path(name)
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"the record of {name}'s weights, {path}, is damaged: fetch them again") from error


def kept_names() -> list[str]:
    """The backbones that weights are kept for."""
    return sorted(unquote(path.stem) for path in _folder().glob("*.json"))


def kept_file(record: Record) -> Path:
    """The file of kept weights, once its content is what the record says.

    Raises:
        CheckpointError: it is gone or has changed.
    """
    path = _folder() / record.file
    if not path.is_file() or sha256_of(path) != record.sha256:
        raise CheckpointError(f"{path} is gone or damaged: run `{COMMAND} {record.name}` again")
    return path


def is_kept(path: Path) -> bool:
    """Is it a file that `keep` wrote, with the names of our own modules?"""
    return path.parent == _folder()


def keep(
    name: str, tensors: Mapping[str, Tensor], *, source: str, source_sha256: str, facts: Mapping[str, Any] | None = None
) -> Record:
    """Write weights and record so that either the old ones are found or the new ones, whatever is killed when.

    Raises:
        CheckpointError: they cannot be written.
    """
    from safetensors.torch import save

    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    sha256 = hashlib.sha256(content).hexdigest()
    record = Record(
        name, f"{quote(name, safe='')}-{sha256[:12]}.safetensors", sha256, source, source_sha256, dict(facts or {})
    )
    before = _folder().glob(f"{quote(name, safe='')}-{'?' * 12}.safetensors")
    outdated = [path for path in before if path.name != record.file]
    write_atomically(_folder() / record.file, content)
    write_atomically(_record_path(name), json.dumps(asdict(record), indent=2).encode())
    for path in outdated:
        path.unlink(missing_ok=True)
    return record


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in a file that somebody brings: safetensors, or what torch.save wrote of tensors alone.

    Raises:
        CheckpointError: there is none, or it holds anything else; nothing in it is ever executed.
    """
    import torch
    from safetensors.torch import load_file

    try:
        found = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except Exception as error:  # torch and safetensors have exceptions of their own, pickle any
        raise CheckpointError(
            f"{path.name} cannot be read as weights: it is damaged, or holds more than tensors"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"{path.name} holds no state dict: a dictionary of names and tensors is wanted")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """`load_state_dict`, all or nothing, with a complaint that names tensors.

    Raises:
        CheckpointError: names or shapes differ.
    """
    wanted = module.state_dict()
    # Files older than PyTorch 0.4.1 lack this counter, which nothing here reads.
    missing = [name for name in wanted if name not in tensors and not name.endswith(".num_batches_tracked")]
    unknown = [name for name in tensors if name not in wanted]
    shaped = [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    complaints = [
        f"{len(names)} {what} ({', '.join(names[:NAMED_AT_MOST])}{', …' if len(names) > NAMED_AT_MOST else ''})"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (shaped, "of another shape"))
        if names
    ]
    if complaints:
        raise CheckpointError(f"the tensors in {source} do not fit: {'; '.join(complaints)}")
    module.load_state_dict({name: tensors.get(name, value) for name, value in wanted.items()})


def package_file(package: str, find: Callable[[Any], str]) -> Path:
    """The file of weights that an installed package carries, checked against the hash in its name.

    Args:
        package: as an installer calls it.
        find: from its module to the path.

    Raises:
        WeightsMissing: the package or its file is not there.
        CheckpointError: the file is damaged.
    """
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise WeightsMissing(f"weights are missing: install the package {package}") from error
    path = Path(find(module))
    if not path.is_file():
        raise WeightsMissing(f"the package {package} is installed without its file {path.name}")
    check_hash(path, hash_in_name(path.name))
    return path


def download(url: str, folder: Path, *, say: Callable[[str], None]) -> Path:
    """Fetch a file whose name ends in the first digits of its own sha256, as torchvision's do, and check them.

    Raises:
        WeightsMissing: it cannot be had.
        CheckpointError: it is not what its name says.
    """
    name = url.rsplit("/", 1)[-1]
    path = folder / name
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, open(path, "wb") as file:  # noqa: S310
            size, done, told = int(answer.headers.get("Content-Length") or 0), 0, 0
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                if done - told >= 16 * CHUNK:
                    told = done
                    say(f"{done // CHUNK} MiB{f' of {size // CHUNK}' if size else ''} of {name}")
    except OSError as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise WeightsMissing(f"{url} cannot be reached ({reason})") from error
    check_hash(path, hash_in_name(name))
    return path


def download_from_hub(repository: str, names: Iterable[str], folder: Path) -> Path:
    """The first of these files that the repository on the Hugging Face hub has.

    The hub's library checks the size; where the hub tells the sha256, that is checked as well.

    Raises:
        WeightsMissing: none of them can be had.
        CheckpointError: the file is not what the hub says.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason: Exception | None = None
    for name in names:
        try:
            etag = get_hf_file_metadata(hf_hub_url(repository, name), timeout=TIMEOUT_S).etag or ""
            path = Path(hf_hub_download(repository, name, local_dir=folder))
        except Exception as error:  # the hub's library changes its HTTP client, and with it what that raises
            reason = error
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue  # the hub was reached, and has no file of this name
            break
        check_hash(path, etag if re.fullmatch("[0-9a-f]{64}", etag) else "")
        return path
    said = str(reason).strip().splitlines()[0] if reason else "no file is named"
    raise WeightsMissing(f"{repository} on the Hugging Face hub cannot be reached ({said})") from reason


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """For a download, on the disk that will keep it."""
    _folder().mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=_folder(), prefix=".fetching-")


def hash_in_name(name: str) -> str:
    """resnet18-f37072fd.pth -> f37072fd; empty where there is none."""
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    return found.group(1) if found else ""


def check_hash(path: Path, digits: str) -> None:
    """Raise CheckpointError unless the file's sha256 begins with these hexadecimal digits."""
    if not sha256_of(path).startswith(digits):
        raise CheckpointError(f"{path.name} is damaged: its sha256 does not begin with {digits}")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder() -> Path:
    return default_cache_dir() / "weights"


def _record_path(name: str) -> Path:
    return _folder() / f"{quote(name, safe='')}.json"
