"""The lease: one of many processes gets it, a dead one frees it, and one that was suspended finds out."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cbmir_spark import config, storage
from cbmir_spark.errors import Busy, EnvironmentProblem, StorageError
from cbmir_spark.lake import lease
from cbmir_spark.storage import ObjectStore
from tests.support.fault_proxy import Answer, DropReply, FaultProxy, Request, each
from tests.support.places import Place, s3_settings
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.timeout(900)

# A job in another process: at each line it acquires the lease, at the next one it checks and releases it.
JOB = """
import json, sys
from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import Busy
from cbmir_spark.lake import lease
from cbmir_spark.storage import ObjectStore
store = ObjectStore(StorageSettings(**json.loads(sys.argv[2])))
print("ready", flush=True)
while sys.stdin.readline():
    try:
        with lease.acquire(sys.argv[1], "tables", store, float(sys.argv[3])) as acquired:
            print("acquired", flush=True)
            sys.stdin.readline()
            acquired.check()
            print("checked", flush=True)
        print("released", flush=True)
    except Busy as error:
        print(f"busy {error.exit_code} {error}", flush=True)
"""


class Job:
    """A process that takes the lease on "go", and releases it on the next."""

    def __init__(self, place: Place, seconds: float) -> None:
        arguments = [place.uri, place.settings.model_dump_json(), str(seconds)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def goes_and_says(self) -> str:
        self.go()
        return self.says()

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


@contextmanager
def jobs(count: int, place: Place, seconds: float = 60.0) -> Iterator[list[Job]]:
    with ExitStack() as stack:
        made = [Job(place, seconds) for _ in range(count)]
        for job in made:
            stack.callback(job.close)
        assert [job.says() for job in made] == ["ready"] * count
        yield made


@contextmanager
def acquired_once_free(place: Place) -> Iterator[lease.Lease]:
    """The lease as soon as another one runs out; how soon that is seen depends on clocks of whole seconds."""
    with ExitStack() as stack:
        deadline = time.monotonic() + 30
        while True:
            try:
                acquired = stack.enter_context(lease.acquire(place.uri, "tables", ObjectStore(place.settings)))
                break
            except Busy:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield acquired


def test_a_second_writer_sees_who_has_the_lease(place: Place) -> None:
    with lease.acquire(place.uri, "tables", ObjectStore(place.settings)) as acquired:
        acquired.check()
        said = rf"process {os.getpid()} on host {re.escape(socket.gethostname())} since 20\d\d-"
        with pytest.raises(Busy, match=said) as caught, lease.acquire(place.uri, "tables", ObjectStore(place.settings)):
            pass
        assert caught.value.exit_code == 75
        with lease.acquire(place.uri, "others", ObjectStore(place.settings)):
            acquired.check()
    with lease.acquire(place.uri, "tables", ObjectStore(place.settings)) as again:
        again.check()


def test_a_lease_is_released_when_the_job_fails(place: Place) -> None:
    with pytest.raises(ZeroDivisionError), lease.acquire(place.uri, "tables", ObjectStore(place.settings)):
        raise ZeroDivisionError
    with lease.acquire(place.uri, "tables", ObjectStore(place.settings)) as acquired:
        acquired.check()


@pytest.mark.parametrize(("rounds", "racers"), [(5, 4), pytest.param(100, 8, marks=pytest.mark.soak)])
def test_of_racing_processes_one_holds_the_lease(place: Place, rounds: int, racers: int) -> None:
    with jobs(racers, place) as started:
        for _ in range(rounds):
            for job in started:
                job.go()
            said = [job.says() for job in started]
            assert said.count("acquired") == 1, said
            assert len([line for line in said if line.startswith("busy 75 ")]) == racers - 1
            winner = started[said.index("acquired")]
            assert winner.goes_and_says() == "checked"
            assert winner.says() == "released"


def test_a_killed_holder_frees_the_lease_at_once(place: Place) -> None:
    with jobs(2, place) as (first, second):
        assert first.goes_and_says() == "acquired"
        with pytest.raises(Busy), lease.acquire(place.uri, "tables", ObjectStore(place.settings)):
            pass
        first.process.kill()
        # Not waited for yet: a zombie holds nothing either.
        time.sleep(0.2)
        assert second.goes_and_says() == "acquired"


def test_a_holder_that_was_suspended_past_its_lease_finds_out(bucket: Place) -> None:
    with jobs(2, bucket, seconds=1.5) as (first, second):
        assert first.goes_and_says() == "acquired"
        first.process.send_signal(signal.SIGSTOP)
        said = second.goes_and_says()
        assert said.startswith("busy 75"), "the lease had not run out yet"
        with acquired_once_free(bucket):
            first.process.send_signal(signal.SIGCONT)
            said = first.goes_and_says()
            assert said.startswith("busy 75 lease tables of this lake expired while this job was suspended")
            assert f"process {os.getpid()} on host" in said


def test_a_holder_that_was_suspended_keeps_a_lease_that_nobody_took(bucket: Place) -> None:
    with jobs(1, bucket, seconds=0.5) as (first,):
        assert first.goes_and_says() == "acquired"
        first.process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        first.process.send_signal(signal.SIGCONT)
        assert first.goes_and_says() == "checked"


def test_a_stopped_holder_of_a_local_lease_keeps_it(tmp_path: Path) -> None:
    here = Place(storage.canonical(str(tmp_path)), config.load(environ={}).storage)
    with jobs(2, here, seconds=0.1) as (first, second):
        assert first.goes_and_says() == "acquired"
        first.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        assert second.goes_and_says().startswith("busy 75")
        first.process.send_signal(signal.SIGCONT)
        assert first.goes_and_says() == "checked"


def test_renewal_keeps_the_lease_for_longer_than_it_lasts(bucket: Place) -> None:
    with lease.acquire(bucket.uri, "tables", ObjectStore(bucket.settings), seconds=1.0):
        time.sleep(1.0 + 5.0)
        with pytest.raises(Busy), lease.acquire(bucket.uri, "tables", ObjectStore(bucket.settings)):
            pass


def test_a_holder_elsewhere_is_waited_for_until_its_lease_runs_out(bucket: Place) -> None:
    """A holder of another machine, or of another container on this one, cannot be seen: only time tells."""
    uri = f"{bucket.uri}/leases/tables.json"
    with lease.acquire(bucket.uri, "tables", ObjectStore(bucket.settings), seconds=2.0):
        ours = json.loads(ObjectStore(bucket.settings).read_bytes(uri))
    elsewhere = ours | {"system": "another boot pid:[1]", "pid": 2**30}
    ObjectStore(bucket.settings).write_bytes(uri, json.dumps(elsewhere).encode())
    with pytest.raises(Busy), lease.acquire(bucket.uri, "tables", ObjectStore(bucket.settings)):
        pass
    # The same process id, given to another process since.
    here = ours | {"started": "1"}
    ObjectStore(bucket.settings).write_bytes(uri, json.dumps(here).encode())
    with lease.acquire(bucket.uri, "tables", ObjectStore(bucket.settings)) as acquired:
        acquired.check()
    ObjectStore(bucket.settings).write_bytes(uri, json.dumps(elsewhere).encode())
    with acquired_once_free(bucket) as acquired:
        acquired.check()
    ObjectStore(bucket.settings).write_bytes(uri, b"not JSON")
    with (
        pytest.raises(Busy, match="held by another job"),
        lease.acquire(bucket.uri, "tables", ObjectStore(bucket.settings)),
    ):
        pass


def test_lost_replies_and_short_outages_lose_no_lease(s3: S3Server, bucket: Place) -> None:
    with FaultProxy(s3.host, s3.port, [each("PUT", "leases/tables", DropReply(), times=2)]) as proxy:
        settings = s3_settings(proxy.endpoint, attempts=3)
        with lease.acquire(bucket.uri, "tables", ObjectStore(settings)) as acquired:
            acquired.check()
            assert len(proxy.faults()) == 2

            def outage(request: Request) -> DropReply | None:
                return DropReply() if request.method == "PUT" else None

            # Written, yet every answer to it is lost, until the attempts are used up.
            proxy.rules[:] = [outage]
            with pytest.raises(StorageError):
                acquired.check()
            proxy.rules.clear()
            acquired.check()
        with lease.acquire(bucket.uri, "tables", ObjectStore(settings)) as acquired:
            acquired.check()


def test_a_server_that_ignores_conditions_is_refused(s3: S3Server, bucket: Place) -> None:
    """One that answers 200 without looking: as servers do that never heard of If-None-Match."""

    def ignore(request: Request) -> Answer | None:
        return Answer(200, "OK") if re.search(rb"(?im)^if-none-match:", request.head) else None

    with (
        FaultProxy(s3.host, s3.port, [ignore]) as proxy,
        pytest.raises(EnvironmentProblem, match="ignores conditional writes"),
        lease.acquire(bucket.uri, "tables", ObjectStore(s3_settings(proxy.endpoint))),
    ):
        pass


def test_a_removed_lock_file_is_noticed(tmp_path: Path) -> None:
    here = Place(storage.canonical(str(tmp_path)), config.load(environ={}).storage)
    with lease.acquire(here.uri, "tables", ObjectStore(here.settings)) as acquired:
        (tmp_path / "leases/tables.lock").unlink()
        with pytest.raises(Busy, match="was deleted"):
            acquired.check()
