"""What fsspec, the packages below it and the servers say when they refuse: an OSError whose errno tells the kind."""

from __future__ import annotations

import errno
import textwrap

from launcher.errors import RunFolderError


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _answer(error: BaseException) -> tuple[str, int, str]:
    """Code, HTTP status and words of the server's refusal, or "", 0 and "" where it was none."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            said = response.get("Error", {})
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(said.get("Code", "")), int(status), str(said.get("Message", ""))
    return "", 0, ""


def code_of(error: BaseException) -> str:
    """The server's own name for its refusal, such as NoSuchBucket; "" where it was none of a server's."""
    return _answer(error)[0]


_KEYS = ("Credential", "Token", "Profile", "Login", "Authentication")
"""Parts of the names of errors about credentials, in whatever package."""
_CONNECTION = {"HTTPClientError", "ConnectionError", "ClientConnectionError", "gaierror"}


def os_error(error: Exception, url: str, limit_s: float) -> OSError:
    """What fsspec, a package below it or the server says, in one line: its errno says what kind it is."""
    code, status, said = _answer(error)
    kinds = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
    words = textwrap.shorten(said or str(error) or type(error).__name__, 200)
    if code and not code.isdigit():
        words = f"{words.rstrip('.')} ({code})"
    if code == "NoSuchBucket":
        number, words = errno.ENOENT, "there is no such bucket"
    elif status == 416 or code == "InvalidRange":
        number = errno.ERANGE
    elif status in (404, 410) or isinstance(error, FileNotFoundError):
        number, words = errno.ENOENT, "no such file" if code in ("", "404", "NoSuchKey") else words
    elif status == 412 or "FileExistsError" in kinds or "ResourceExistsError" in kinds:
        number = errno.EEXIST
    elif status == 501 or isinstance(error, NotImplementedError):
        number = errno.ENOSYS
    elif status in (401, 403) or "PermissionError" in kinds or any(word in kind for kind in kinds for word in _KEYS):
        number = errno.EACCES
    elif "FSTimeoutError" in kinds and not code:
        number, words = errno.ETIMEDOUT, f"no answer within {limit_s:.0f} s"
    elif "ParamValidationError" in kinds:
        number = errno.EINVAL
    elif kinds & _CONNECTION:
        number = errno.EHOSTUNREACH
    else:
        number = (isinstance(error, OSError) and error.errno) or errno.EIO
    return OSError(number, words, url)


def refused(url: str, doing: str, error: OSError) -> RunFolderError:
    """The same for the user, before a run begins."""
    aws = url.startswith(("s3://", "s3a://"))
    if error.errno == errno.EACCES:
        hint = (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use a role that may list, read, write "
            "and delete there; for a server other than Amazon's also AWS_ENDPOINT_URL"
            if aws
            else "give the credentials of this store, as its own tools take them"
        )
    elif error.errno in (errno.ENOENT, errno.EINVAL):
        hint = "make the bucket, or mend the URL" + (" or AWS_ENDPOINT_URL" if aws else "")
    elif error.errno == errno.ENOSYS:
        hint = "the server must be able to make a file only where there is none (If-None-Match)"
    else:
        hint = "check the connection" + (" and, for a server other than Amazon's, AWS_ENDPOINT_URL" if aws else "")
    return RunFolderError(f"{url}: {doing} failed: {error.strerror}", hint=hint)
