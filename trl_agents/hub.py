# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Pushing to the Hub of Hugging Face without staking the training on it.

What is pushed, when and under which settings (`push_to_hub`, `hub_model_id`, `hub_strategy`, ...) is as in
[`~transformers.Trainer`]. What it lacks is here: a push that fails is told, with the command that makes up for it, and
raises nothing; a server that does not answer is not waited for without end; and the token stays at home.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, get_session, get_token
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers.utils import PushInProgress


LEFT_OUT = ("_*", "checkpoint-*")  # what transformers does not push of a folder
SECONDS_TO_CREATE, SECONDS_TO_UPLOAD = 20, 60  # without a byte from the server, or to it

logger = logging.getLogger(__name__)


class NoRepository(Exception):
    """There is none to push to, which was told when it could not be created."""


class Token(str):
    """A token that pickles as None: transformers pickles a trainer's arguments, and pushes that file too."""

    def __reduce_ex__(self, protocol):
        return type(None), ()

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


class PushesSafely:
    """
    Mixed into a trainer, before the trainer it inherits: a failing push costs neither the training nor what it saved.

    Local faults, such as a disk that is full, are raised as ever.
    """

    push_in_progress = None  # transformers has it from when there is a repository
    pushing = False  # within `push_to_hub`
    uploads = False  # and there, all is saved by now

    def __init__(self, model, reward_funcs, args, *others, **kwargs):
        if args is not None and args.hub_token:
            args.hub_token = Token(args.hub_token)
        super().__init__(model, reward_funcs, args, *others, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, on the main process. Where that fails, the next push tries again."""
        if not self.is_world_process_zero():
            return
        try:
            wait_at_most(SECONDS_TO_CREATE)
            super().init_hf_repo(token=token, private=private)
        except Exception as error:
            self.tell("creating the repository", error, token=token)

    def push_to_hub(self, commit_message="End of training", *args, **kwargs) -> CommitInfo | Future | None:
        """Save and push, as [`~transformers.Trainer.push_to_hub`] does. None where that failed, or is not this
        process's work."""
        if self.push_in_progress is not None:
            self.push_in_progress.wait_until_done()  # it reads the files that are written now
        token = kwargs.get("token")
        self.pushing = True
        try:
            pushed = super().push_to_hub(commit_message, *args, **kwargs)
        except NoRepository:
            return None
        except Exception as error:
            if not self.uploads:
                raise
            self.tell(f"uploading {self.args.output_dir!r} ({commit_message})", error, token=token)
            return None
        finally:
            self.pushing = self.uploads = False
        if isinstance(pushed, Future):
            self.push_in_progress = PushInProgress([pushed])
            self.tell_when_done(pushed, f"uploading {self.args.output_dir!r} ({commit_message})", token=token)
        return pushed

    def may_write(self) -> bool:
        """
        Whether no push is reading the output folder, so that its files may be written anew. Where every checkpoint is
        to be pushed (`hub_always_push`), that is waited for; else the checkpoint's push will be left out as well.
        """
        push = self.push_in_progress
        if push is not None and self.args.hub_always_push:
            push.wait_until_done()
        return push is None or push.is_done()

    # -- what the seam calls ------------------------------------------------------------------------------------------

    def before_upload(self) -> None:
        if not self.pushing:  # training ends, and waited for the last checkpoint's push
            return
        if self.hub_model_id is None:
            raise NoRepository
        wait_at_most(SECONDS_TO_UPLOAD)
        self.uploads = True

    def push_checkpoint(self, checkpoint_folder: str, push: Callable[[str], None]) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        name = Path(checkpoint_folder).name
        try:
            if self.hub_model_id is None:
                self.init_hf_repo()
            if self.hub_model_id is None:
                return
            wait_at_most(SECONDS_TO_UPLOAD)
            known = list(self.push_in_progress.jobs) if self.push_in_progress is not None else []
            push(checkpoint_folder)
        except Exception as error:  # the checkpoint itself is on the disk
            self.tell(f"pushing {name}", error)
            return
        jobs = self.push_in_progress.jobs if self.push_in_progress is not None else []
        places = [{}, {"folder": checkpoint_folder, "path": self.place_of(name)}]  # the model, then the checkpoint
        for job, place in zip([job for job in jobs if job not in known], places, strict=False):
            self.tell_when_done(job, f"pushing {name}", **place)

    def place_of(self, checkpoint: str) -> str:
        """Where in the repository a checkpoint goes."""
        return "last-checkpoint" if self.args.hub_strategy == "checkpoint" else checkpoint

    def tell_when_done(self, job: Future, what: str, **kwargs: Any) -> None:
        def tell(job: Future) -> None:
            if not job.cancelled() and job.exception() is not None:
                self.tell(what, job.exception(), **kwargs)

        job.add_done_callback(tell)

    def tell(self, what: str, error: BaseException, folder: str | None = None, path: str = ".", token=None) -> None:
        args = self.args
        repo_id = self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
        told = describe_failure(
            what,
            error,
            folder or args.output_dir,
            repo_id,
            path=path,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            secrets=(token, args.hub_token),
        )
        logger.error(told)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> CommitInfo | None:
    """
    Push a folder with a saved model, its card and what lies beside them, as it is. Call it on the main process.

    Args:
        folder (`str` or `Path`):
            What to push. Checkpoints and names that begin with `_` are left out.
        repo_id (`str`):
            The repository, `"you/your-agent"`. It is created if there is none.
        commit_message (`str`, *optional*, defaults to `"Upload model"`):
            Message of the commit.
        token (`str`, *optional*):
            Token with write permission. Defaults to the one of `hf auth login`.
        private (`bool`, *optional*):
            Whether a repository that is created is private.
        revision (`str`, *optional*):
            Branch to push to. Defaults to the main one.

    Returns:
        [`~huggingface_hub.CommitInfo`], or None if it failed, which is told and not raised.
    """
    api = HfApi(token=token)
    try:
        wait_at_most(SECONDS_TO_UPLOAD)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=list(LEFT_OUT),
            revision=revision,
        )
    except Exception as error:
        place = {"private": private, "revision": revision, "secrets": (token,)}
        logger.error(describe_failure(f"uploading {str(folder)!r}", error, folder, repo_id, **place))
        return None


def stage_repository(args: Any, folder: str | Path) -> str:
    """Name of the repository of one stage of a recipe: that of the recipe's `args`, and the stage's folder."""
    name = re.sub(r"[^\w.-]+", "-", Path(folder).name)  # a stage may be called `epsilon_greedy=0.1`
    return f"{args.hub_model_id or Path(args.output_dir).absolute().name}-{name}"


def wait_at_most(seconds: float) -> None:
    """The Hub's client waits for a silent server for ever: let it give up where nobody has set a limit."""
    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)
    _limit.seconds = seconds


class _Limit:
    seconds = SECONDS_TO_UPLOAD

    def __call__(self, request: Any) -> None:
        limits = request.extensions.get("timeout") or {}
        asked = {name: limits.get(name) for name in ("connect", "read", "write", "pool")}
        request.extensions["timeout"] = {name: value or self.seconds for name, value in asked.items()}


_limit = _Limit()


def describe_failure(
    what: str,
    error: BaseException,
    folder: str | Path,
    repo_id: str,
    *,
    path: str = ".",
    private: bool | None = None,
    revision: str | None = None,
    secrets: tuple[str | None, ...] = (),
) -> str:
    """What failed, why, what may mend it, and the command that pushes later."""
    reason = f"{type(error).__name__}: {error}"
    for secret in filter(None, (*secrets, get_token())):  # a header that is refused is quoted in the error
        for form in (secret, repr(secret)[1:-1]):
            reason = reason.replace(form, "***")
    reason = re.sub(r"\s+", " ", reason)
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    mend = ""
    if isinstance(error, HFValidationError):
        mend, repo_id = f" {repo_id!r} is no name of a repository: use one like `you/your-agent`.", "YOU/YOUR-AGENT"
    elif status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        mend = " Log in with a token that may write there: `hf auth login`."
    elif isinstance(error, OfflineModeIsEnabled):
        mend = " Unset HF_HUB_OFFLINE."
    command = ["hf", "upload", repo_id, str(Path(folder).absolute()), path]
    if path == ".":
        command += [word for pattern in LEFT_OUT for word in ("--exclude", pattern)]
    command += ["--private"] if private else []
    command += ["--revision", revision] if revision else []
    return (
        f"Hub: {what} failed. {reason[:600]}{mend}\n"
        f"The run goes on, and nothing is lost: what is saved is in {str(folder)!r}. To push it later:\n\n"
        f"    {shlex.join(command)}\n"
    )
