# SPDX-License-Identifier: Apache-2.0
"""A checkpoint to the Hub: what goes up is listed, checked, and sent so that a broken upload can be gone on with.

Files go up by an allow-list of names; reports with excerpts of rows, replies, states and checkpoints of the training
stay. Everything becomes visible in one commit at the end, so that the repository is never half a model. The token is
read by huggingface_hub (`hf auth login`, HF_TOKEN), and is in no message.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from thinkfusion.card_facts import ADAPTER, is_path, last_part, measured_report, read_facts, read_json, weights_header
from thinkfusion.card_facts import embedded as is_embedded
from thinkfusion.checkpointing import TINY_BASE, check_folder
from thinkfusion.digests import weight_files
from thinkfusion.model_card import make_card
from thinkfusion.sources import without_secrets

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

logger = logging.getLogger(__name__)

CARD = "README.md"
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", ADAPTER)
TEXTS = (
    *("model.safetensors.index.json", "tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)
_STALE = re.compile(
    r"[^/]*\.safetensors(\.index\.json)?|(pytorch_model|adapter_model)[^/]*\.(bin|pt|json)|adapter_config\.json"
    r"|config\.json|generation_config\.json|chat_template\.\w+|additional_chat_templates/[^/]*|tokenizer[^/]*"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
)
"""What an earlier model in the repository may have left that would be read beside this one."""
_PLACES = ("_name_or_path", "name_or_path", "vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file")
"""Settings that hold where a file was; nobody needs them elsewhere."""
_ATTEMPTS = 4

T = TypeVar("T")


class PublishingError(OSError):
    """The Hub did not take the upload; the repository is as it was before it, and the checkpoint too."""


@dataclass(frozen=True)
class UploadFile:
    """A file as it will be in the repository, from the disk or, where it had to be changed, from memory."""

    name: str
    source: Path | bytes
    size_bytes: int


@dataclass(frozen=True)
class Upload:
    """What would go to the Hub: see `plan_upload`. `left` stays here; `remarks` say what was changed or is missing."""

    repo: str
    files: tuple[UploadFile, ...]
    left: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def card(self) -> str:
        """The model card, as it goes up."""
        source = next(file.source for file in self.files if file.name == CARD)
        assert isinstance(source, bytes)
        return source.decode()

    def __str__(self) -> str:
        total = sum(file.size_bytes for file in self.files)
        lines = [f"{self.repo}: {len(self.files)} files, {_size(total)}"]
        lines += [f"  {_size(file.size_bytes):>10}  {file.name}" for file in self.files]
        lines += [f"Stays here: {', '.join(self.left)}"] if self.left else []
        return "\n".join([*lines, *(f"- {remark}" for remark in self.remarks)])


def push_checkpoint(
    checkpoint: str | Path,
    repo: str,
    *,
    public: bool = False,
    report: str | Path | None = None,
    without_report: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    message: str = "Upload a model with two modes, by thinkfusion",
    token: str | None = None,
) -> str:
    """Upload the checkpoint in the folder `checkpoint` to the Hub's repository `repo` (`owner/name`); its address.

    public: make a new repository public; by default it is private, and one that is public already is refused.
    report, without_report, license, base_model: as in `plan_upload`. message: of the commit. token: by default the one
    that huggingface_hub finds.

    Raises what `plan_upload` raises, ValueError without a token, and PublishingError for what the Hub refuses and for a
    broken connection. Called again, it goes on: files that are there are not sent again.
    """
    upload = plan_upload(
        checkpoint, repo, report=report, without_report=without_report, license=license, base_model=base_model
    )
    logger.info("%s", upload)
    return send(upload, public=public, message=message, token=token)


# What goes up ------------------------------------------------------------------------------------------


def plan_upload(
    checkpoint: str | Path,
    repo: str,
    *,
    report: str | Path | None = None,
    without_report: bool = False,
    license: str | None = None,
    base_model: str | None = None,
) -> Upload:
    """What of a checkpoint's folder would go to `repo`, with its model card; writes nothing.

    report: the file of the mode report, by default the checkpoint's. without_report: do without, or with an outdated
    one; the card says so in its first line. license: the Hub's identifier, by default that of the base's card, which
    may be asked for over the network. base_model: the base's Hub id, where the files do not know it; needed for an
    adapter whose base is a local folder.

    Raises ValueError for a name that the Hub would refuse, for a mode report that is not one of these weights, for
    damaged files, and for one that tells a path of this machine; FileNotFoundError without a checkpoint or a report.
    """
    folder = Path(checkpoint)
    check_repo_name(repo)
    if base_model is not None:
        check_repo_name(base_model, "base_model")
    if not folder.exists():
        raise FileNotFoundError(f"{checkpoint}: there is no such checkpoint folder.")
    check_folder(folder)
    measured = None if without_report else measured_report(folder, report)
    files, remarks = _files(folder, base_model)
    licence: Mapping[str, str] | str | None = license or base_license(folder, base_model)
    if licence is None:
        remarks.append("no licence: none was given, and no card of the base names one (--license)")
    if measured is None:
        remarks.append("the card says that nothing was measured")
    card = str(make_card(folder, repo, report=measured, license=licence, base_model=base_model)).encode()
    files.append(UploadFile(CARD, card, len(card)))
    names = {file.name for file in files}
    left = sorted(path.name for path in folder.iterdir() if path.name not in names or path.name == CARD)
    for file in files:
        _check_places(file, folder)
    return Upload(repo, tuple(sorted(files, key=lambda file: file.name)), tuple(left), tuple(remarks))


def check_repo_name(repo: str, what: str = "repository") -> None:
    """Raise ValueError unless `repo` is a name that the Hub takes, with its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    reason = "" if repo.count("/") == 1 and all(repo.split("/")) else "it has no owner"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).split(": '")[0].rstrip(".")
    if reason:
        raise ValueError(
            f"{what}: found {repo!r}, expected owner/name, of letters, digits, '-', '_' and '.' ({reason}). Give the "
            "name as it stands in its address on the Hub."
        )


def _files(folder: Path, base_model: str | None) -> tuple[list[UploadFile], list[str]]:
    """The files of the allow-list, and remarks on those that are changed on their way."""
    files = [UploadFile(path.name, path, path.stat().st_size) for path in weight_files(folder)]
    remarks: list[str] = []
    for name in SETTINGS:
        settings = read_json(folder / name)
        if settings is None:
            continue
        content, changed = _without_places(name, settings, base_model)
        remarks += changed
        path = folder / name
        files.append(
            UploadFile(name, content, len(content)) if changed else UploadFile(name, path, path.stat().st_size)
        )
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in (*(folder / name for name in TEXTS), *templates):
        if path.is_file():
            files.append(UploadFile(path.relative_to(folder).as_posix(), path, path.stat().st_size))
    return files, remarks


def _without_places(name: str, settings: dict[str, Any], base_model: str | None) -> tuple[bytes, list[str]]:
    """The settings without places of this machine, as they go up, and remarks on what was changed."""
    remarks = []
    for key in _PLACES:
        if isinstance(settings.get(key), str) and is_path(settings[key]):
            del settings[key]
            remarks.append(f"{name}: {key} is left out, it named a place on this machine")
    base = settings.get("base_model_name_or_path") if name == ADAPTER else None
    if base is not None and base_model is not None and base != base_model:
        settings["base_model_name_or_path"], settings["revision"] = base_model, None
        remarks.append(f"{name}: the base is named {base_model}")
    elif base is not None and (is_path(base) or Path(base).is_dir()):
        raise ValueError(
            f"{name}: the base is the folder {last_part(base)} of this machine, which nobody else has. Give its Hub id "
            "(--base-model owner/name), or export merged weights."
        )
    elif base == TINY_BASE:
        remarks.append(f"{name}: the base is the one embedded in thinkfusion; only thinkfusion loads it")
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(), remarks


def _check_places(file: UploadFile, folder: Path) -> None:
    """Raise ValueError if a file tells where on this machine things are: its home, this folder, the one worked in."""
    if isinstance(file.source, bytes):
        text = file.source.decode()
    elif file.name.endswith(".safetensors"):
        text = json.dumps(weights_header(file.source).get("__metadata__", {}))
    elif file.name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"):
        return  # a vocabulary, in which any text may stand
    else:
        text = file.source.read_text(encoding="utf-8", errors="replace")
    for place in {Path.home(), folder.resolve(), Path.cwd()}:
        # JSON may write a backslash twice.
        if len(place.parts) > 1 and re.search(
            r"(?<![\w.-])" + re.escape(str(place)) + r"(?![\w.-])", text.replace("\\\\", "\\")
        ):
            raise ValueError(
                f"{file.name}: it holds a path of this machine ({place}), which everybody would read. Take it out, or "
                "export the checkpoint again."
            )


def base_license(folder: Path, base_model: str | None = None) -> dict[str, str] | None:
    """The licence that the base's card names, as metadata; None if there is no such card, or it cannot be had."""
    from huggingface_hub import HfApi

    bases = read_facts(folder, base_model=base_model).bases
    if len(bases) != 1:
        return None
    if is_embedded(bases[0]):
        return {"license": "apache-2.0"}  # it was made by this project, from nothing else
    if not bases[0].on_hub:
        return None
    try:
        # One request and no second: the download of the card would be tried for half a minute without a network.
        data = HfApi().model_info(bases[0].name, timeout=10).card_data
    except Exception as error:  # of the network, of the Hub or of the card; the upload does without
        logger.warning("The card of %s could not be read: %s.", bases[0].name, type(error).__name__)
        return None
    if data is None or not isinstance(data.get("license"), str):
        return None
    return {name: data[name] for name in ("license", "license_name", "license_link") if isinstance(data.get(name), str)}


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} B"


# Sending ------------------------------------------------------------------------------------------


def require_token(token: str | None = None) -> str:
    """The token that huggingface_hub finds; ValueError if there is none."""
    from huggingface_hub import get_token

    found = token or get_token()
    if not found:
        raise ValueError(
            "no token: the Hub takes uploads from those it knows only. Log in with `hf auth login`, or set HF_TOKEN."
        )
    return found


def send(upload: Upload, *, public: bool = False, message: str, token: str | None = None) -> str:
    """Send what `plan_upload` planned, as `push_checkpoint` says; the repository's address.

    Weights go first, file by file: each that the Hub holds whole is not sent again. Then one commit makes everything
    visible and takes away what another model left there.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=require_token(token), library_name="thinkfusion")
    repo = upload.repo
    with _plain_errors(repo, api):
        _again(api.whoami)
    with _plain_errors(repo, api):
        _again(lambda: api.create_repo(repo, private=not public, exist_ok=True))
        info = _again(lambda: api.model_info(repo))
    if info.private is False and not public:
        raise PublishingError(
            f"{repo}: found a public repository, expected a private one. Add --public if everybody may have the model, "
            "or give another name."
        )
    head = info.sha
    there = [each.rfilename for each in info.siblings or ()]
    sent = {file.name for file in upload.files}
    stale = [name for name in there if _STALE.fullmatch(name) and name not in sent]
    digests: dict[str, bytes] = {}
    with _plain_errors(repo, api):
        for file in upload.files:
            if isinstance(file.source, Path) and file.name.endswith(".safetensors"):
                weights = _operation(file, digests)
                api.preupload_lfs_files(repo, [weights])
                digests[file.name] = weights.upload_info.sha256
        _again(lambda: _commit(api, upload, stale, message=message, head=head, digests=digests))
    return f"{api.endpoint}/{repo}"


def _operation(file: UploadFile, digests: Mapping[str, bytes]) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(file.name, file.source)
    if file.name in digests:  # large files are read once for it
        operation.upload_info.sha256 = digests[file.name]
    return operation


def _commit(
    api: HfApi, upload: Upload, stale: list[str], *, message: str, head: str | None, digests: Mapping[str, bytes]
) -> None:
    """One commit. Made anew at each attempt: if an answer was lost, the client sees that nothing is left to do."""
    from huggingface_hub import CommitOperationDelete

    added = [_operation(file, digests) for file in upload.files]
    removed = [CommitOperationDelete(name) for name in stale]
    try:
        api.create_commit(upload.repo, [*added, *removed], commit_message=message, parent_commit=head)
    except Exception as error:
        # A lost answer leaves the commit there; then the head is another, and holds what was sent.
        if _status(error) in (409, 412) and _is_there(api, upload, head):
            return
        raise


def _is_there(api: HfApi, upload: Upload, head: str | None) -> bool:
    """Whether the repository has gone on from `head` and holds all these files."""
    from huggingface_hub.utils import sha

    info = api.model_info(upload.repo, files_metadata=True)
    found = {each.rfilename: each for each in info.siblings or ()}
    for file in upload.files:
        each = found.get(file.name)
        if each is None:
            return False
        content = file.source if isinstance(file.source, bytes) else None
        if each.lfs is None and content is None and isinstance(file.source, Path):
            content = file.source.read_bytes()
        if content is not None and each.lfs is None and each.blob_id != sha.git_hash(content):
            return False
        if each.lfs is not None and each.lfs.sha256 != _operation(file, {}).upload_info.sha256.hex():
            return False
    return bool(info.sha != head)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _again(call: Callable[[], T]) -> T:
    """What `call` gives, tried again after errors that pass: of the server (5xx, 429), and of the connection."""
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except Exception as error:
            status = _status(error)
            passes = status == 429 or status >= 500 if status is not None else _of_connection(error)
            if not passes or attempt == _ATTEMPTS - 1:
                raise
            logger.warning("The Hub: %s; trying again.", status or "the connection broke")
            time.sleep(2.0**attempt)
    raise AssertionError


def _of_connection(error: BaseException) -> bool:
    """Whether it comes from the HTTP library that huggingface_hub uses, and not from a check of ours or theirs."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    return isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0].startswith("http")


@contextmanager
def _plain_errors(repo: str, api: HfApi) -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence or two, without its causes, and without the token."""
    try:
        yield
    except Exception as error:  # the client has a dozen types, and the HTTP library under it others
        cause: BaseException = error
        while _status(cause) is None and cause.__cause__ is not None:
            cause = cause.__cause__
        said = str(getattr(cause, "server_message", None) or cause).strip().splitlines() or [type(cause).__name__]
        first = without_secrets(said[0].replace(str(api.token), "***"))
        reason = _REASONS.get(_status(cause) or 0)
        status = _status(cause)
        if reason is not None:
            text = reason
        elif status is not None and status >= 500:
            text = "the Hub failed, several times in a row. Nothing was committed; start the same command again later"
        elif status is None and _of_connection(cause):
            text = "the connection broke. Start the same command again; files that are there are not sent again"
        else:
            text = "the Hub refused"
        raise PublishingError(f"{repo}: {text} ({f'{status}: ' if status else ''}{first}).") from None


_REASONS = {
    401: "the Hub does not know this token. Log in again with `hf auth login`, or set HF_TOKEN to one that may write",
    403: "the token may not write there. Take one with write permission for it, or a repository of your own",
    404: "the Hub has no such repository for this token. Check the owner's name",
    409: "the repository changed during the upload. Nothing was committed; start the same command again",
    412: "the repository changed during the upload. Nothing was committed; start the same command again",
    429: "too many requests. Wait some minutes, and start the same command again",
}
