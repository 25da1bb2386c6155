"""Places that are URLs: whatever fsspec knows (`s3://`, `gs://`, `https://`, ...), and its errors in plain words.

reads: nothing by itself. Credentials and endpoints are fsspec's and its storages' own (of S3: `AWS_*`, `~/.aws`; of
any: `FSSPEC_<PROTOCOL>_*`, `~/.config/fsspec`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from cprec.errors import CPRecError, DataError, did_you_mean

_EXTRAS = {"s3": "'cprec[s3]'", "s3a": "'cprec[s3]'", "gs": "'cprec[gcs]'", "gcs": "'cprec[gcs]'"}
_PASSING_STATUS = (408, 425, 429)
"""HTTP answers of the 400s that another try may change: timeout, too early, too many requests."""
_REFUSED = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "ProfileNotFound")
"""Errors of S3's client for credentials that are not there; known by name, because the client is optional."""


def is_url(place: str) -> bool:
    """Whether `place` is a URL and no local path."""
    return "://" in place


def filesystem(url: str) -> tuple[Any, str]:
    """The storage of `url` and the name that it has there. Raises what fsspec does."""
    fs, inside = fsspec.core.url_to_fs(url)
    return fs, str(inside)


def is_lasting(e: BaseException) -> bool:
    """Whether another try would end in the same error: nothing there, no access, no such storage, a refused request."""
    if isinstance(e, (CPRecError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
                      ImportError, ValueError, TypeError)) or type(e).__name__ in _REFUSED:
        return True
    status = getattr(e, "status", None) or getattr(e, "code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS


@contextmanager
def reaching(place: str) -> Iterator[None]:
    """Turn whatever a storage raises into a DataError that names the place and the way out."""
    scheme = place.partition("://")[0]
    try:
        yield
    except CPRecError:
        raise
    except ImportError as e:
        package = _EXTRAS.get(scheme)
        raise DataError(f"{place}: {e}; run: pip install {package or 'the package it names'}") from None
    except FileNotFoundError:
        raise DataError(f"{place} does not exist; check the address") from None
    except ValueError as e:
        if "Protocol not known" not in str(e):
            raise DataError(f"{place}: {e}") from e
        known = did_you_mean(scheme, fsspec.available_protocols())
        raise DataError(f"{place}: no storage is called {scheme}://; {known}") from None
    except Exception as e:  # each storage's client raises errors of its own kinds
        if isinstance(e, PermissionError) or type(e).__name__ in _REFUSED:
            raise DataError(f"{place}: access is refused: {type(e).__name__}: {e}; credentials are the storage's own "
                            f"(of s3: AWS_* variables or ~/.aws) or fsspec's (FSSPEC_{scheme.upper()}_*)") from e
        raise DataError(f"{place}: cannot be read: {type(e).__name__}: {e}; check the file, the address and "
                        f"your access") from e
