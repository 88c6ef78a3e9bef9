"""Whether a repository of the Hub can be written, as far as the Hub tells. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stages.model.hub import from_hub
from stages.run.errors import InputError

PRIVATE, PUBLIC, MISSING = "private", "public", "missing"
_SIGN_IN = "Sign in with a token that may write there (`hf auth login`, or HF_TOKEN)."


def visibility(kind: str, target: str) -> str:
    """PRIVATE, PUBLIC or MISSING: a repository to write (kind: push, a dataset, or push model).

    Raises InputError with the remedy where the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def ask() -> str:
        try:
            info = HfApi().repo_info(target, repo_type="model" if "model" in kind else "dataset")
        except RepositoryNotFoundError:
            return MISSING
        return PRIVATE if info.private else PUBLIC

    return from_hub(kind, target, "", ask)


def model_visibility(target: str, public: bool) -> str:
    """`visibility` of HUB_REPO. Raises InputError for a public one unless HUB_PUBLIC=1 (`public`),
    and where there is no token."""
    from huggingface_hub import get_token

    if not get_token():
        raise InputError(f"HUB_REPO={target}: there is no token for the Hub. {_SIGN_IN}")
    found = visibility("push model", target)
    if found == PUBLIC and not public:
        raise InputError(
            f"HUB_REPO={target} is public on the Hub: everyone could read the model, and the "
            "questions and answers on its card. Set HUB_PUBLIC=1 to allow that, make it private, "
            "or name another."
        )
    return found


def rights(target: str) -> tuple[str, list[str]]:
    """Whose the token is, as a phrase, and why it may not write to `target`: what the Hub tells of
    the token (https://huggingface.co/docs/hub/security-tokens). Raises InputError where it does not
    answer."""
    from huggingface_hub import HfApi

    told: Any = from_hub("push model", target, "", lambda: HfApi().whoami())
    account = str(told.get("name"))
    return f"the token is {account}'s", list(_missing_rights(target, account, told))


def _missing_rights(target: str, account: str, told: dict[str, Any]) -> Iterator[str]:
    owner = target.split("/")[0].lower()
    roles = {str(org.get("name")).lower(): org.get("roleInOrg") for org in told.get("orgs") or []}
    if owner != account.lower() and owner not in roles:
        owners = " or ".join([account, *roles])
        yield (
            f"the token is {account}'s, who is no member of {owner}. Set HUB_REPO to a name of "
            f"{owners}, or sign in with another account (`hf auth login`, or HF_TOKEN)."
        )
    elif roles.get(owner) == "read":
        yield f"{account} may only read in {owner}. Ask an administrator of {owner} for more."
    token = (told.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        yield f"the token of {account} may only read. {_SIGN_IN}"
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and isinstance(scopes, list):
        writable = {
            str((scope.get("entity") or {}).get("name")).lower()
            for scope in scopes
            if "repo.write" in scope.get("permissions", [])
        }
        if not writable & {owner, target.lower()}:
            yield (
                f"the fine-grained token of {account} has no right to write to {owner}'s "
                "repositories. Add it at https://huggingface.co/settings/tokens."
            )
