"""The errors: what they say, what they are, and that they survive the way between processes."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest

from userfault import errors

_SAMPLES = [
    errors.Error("plain"),
    errors.KernelError(errno.EEXIST, "ioctl(UFFDIO_COPY)", "address 0x1000"),
    errors.UnsupportedError("userfaultfd feature MOVE", "It needs Linux 6.8 or later.", "refused"),
    errors.StoreError("could not be read", store="FileStore('x')", offset=65536, length=10, attempts=3, cause="EIO"),
    errors.RegionClosedError("closed"),
    errors.PagerLostError("lost"),
    errors.ProtocolError("left"),
    errors.LocalProtocolError(errno.EINVAL, "write(userfaultfd)", "7 bytes"),
    errors.RemoteProtocolError("theirs"),
]


@pytest.mark.parametrize("error", _SAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", ["pickle", "copy"])
def test_errors_survive_the_way_between_processes(error: errors.Error, way: str) -> None:
    error.add_note("seen by a test")

    other = pickle.loads(pickle.dumps(error)) if way == "pickle" else copy.copy(error)

    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)
    assert isinstance(other, errors.Error)


def test_every_error_is_sampled_and_public() -> None:
    assert {type(error).__name__ for error in _SAMPLES} == set(errors.__all__)


def test_a_kernel_error_names_the_call_and_is_an_os_error() -> None:
    error = errors.KernelError(errno.EEXIST, "ioctl(UFFDIO_COPY)", "address 0x1000")

    assert str(error) == "ioctl(UFFDIO_COPY): [Errno 17] File exists: address 0x1000"
    assert str(errors.KernelError(errno.EPERM, "userfaultfd")) == "userfaultfd: [Errno 1] Operation not permitted"
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror, error.args) == (17, "File exists", (17, "File exists"))
    assert (error.syscall, error.detail) == ("ioctl(UFFDIO_COPY)", "address 0x1000")


def test_a_local_protocol_error_is_an_os_error_with_the_errno_of_the_specification() -> None:
    error = errors.LocalProtocolError(errno.ERANGE, "write(userfaultfd)", "empty")

    assert str(error) == "write(userfaultfd): [Errno 34] Numerical result out of range: empty"
    assert isinstance(error, OSError)
    assert isinstance(error, errors.ProtocolError)
    assert not isinstance(error, errors.KernelError)


def test_an_unsupported_error_says_what_where_and_what_to_do() -> None:
    error = errors.UnsupportedError("ioctl(PAGEMAP_SCAN)", "It needs Linux 6.7 or later.", "ENOTTY")

    assert str(error) == (
        f"ioctl(PAGEMAP_SCAN) is not available on Linux {error.kernel}: ENOTTY. It needs Linux 6.7 or later."
    )
    assert (error.capability, error.remedy) == ("ioctl(PAGEMAP_SCAN)", "It needs Linux 6.7 or later.")


def test_a_store_error_names_store_range_and_cause() -> None:
    error = errors.StoreError("short read", store="FileStore('x')", offset=8, length=4, attempts=2, cause="EOF")

    assert str(error) == "FileStore('x'): short read (offset 8, length 4) after 2 attempts: EOF"
    assert str(errors.StoreError("short read")) == "short read"
    assert (error.store, error.offset, error.length, error.attempts, error.cause) == (
        "FileStore('x')",
        8,
        4,
        2,
        "EOF",
    )


def test_a_closed_region_is_a_value_error_as_a_closed_file_is() -> None:
    assert issubclass(errors.RegionClosedError, ValueError)
    assert issubclass(errors.LocalProtocolError, errors.ProtocolError)
    assert issubclass(errors.RemoteProtocolError, errors.ProtocolError)
