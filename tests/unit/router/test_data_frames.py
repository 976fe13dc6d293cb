"""DATA past h2's state machine: what a client's h2 reads, its windows, and the order of frames."""

import h2.events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes
from hypothesis import given
from hypothesis import strategies as st

from router.grpc.data_frames import DataFrames

HEADERS = [(b":status", b"200")]


class Ends:
    """Both ends of a connection in which a client has made `num_calls` calls."""

    def __init__(self, window: int = 65_535, num_calls: int = 1) -> None:
        self.client = H2Connection(H2Configuration(client_side=True))
        self.server = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self.frames = DataFrames(self.server)
        self.client.initiate_connection()
        self.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.server.initiate_connection()
        self.calls: list[int] = []
        for _ in range(num_calls):
            call = self.client.get_next_available_stream_id()
            self.client.send_headers(
                call,
                [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "a")],
                end_stream=True,
            )
            self.calls.append(call)
        self.server.receive_data(self.client.data_to_send())
        for call in self.calls:
            self.server.send_headers(call, HEADERS)

    def deliver(self) -> list[h2.events.Event]:
        """What waits at the server reaches the client."""
        return self.client.receive_data(self.frames.take())


def data_of(events: list[h2.events.Event], call: int) -> bytes:
    return b"".join(
        event.data
        for event in events
        if isinstance(event, h2.events.DataReceived) and event.stream_id == call
    )


@given(
    window=st.integers(0, 40_000),
    messages=st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=40_000)), max_size=8),
    grants=st.lists(st.integers(1, 60_000), max_size=8),
)
def test_all_arrives_in_order_and_never_more_than_the_windows_take(window, messages, grants):
    ends = Ends(window, num_calls=3)
    rests = dict.fromkeys(ends.calls, b"")
    wanted = dict.fromkeys(ends.calls, b"")
    got = dict.fromkeys(ends.calls, b"")

    def exchange():
        for call in ends.calls:
            rests[call] = ends.frames.add(call, rests[call])
        events = ends.deliver()  # the client's h2 raises at what its windows do not allow
        for call in ends.calls:
            got[call] += data_of(events, call)

    for at, message in messages:
        wanted[ends.calls[at]] += message
        rests[ends.calls[at]] += message
        exchange()
    for grant in [*grants, *[60_000] * 10]:
        for call in ends.calls:
            ends.client.increment_flow_control_window(grant, call)
        ends.client.increment_flow_control_window(grant)
        ends.server.receive_data(ends.client.data_to_send())
        exchange()
    assert got == wanted


def test_frames_of_h2_keep_their_place_among_data():
    ends = Ends()
    (call,) = ends.calls
    ends.frames.add(call, b"first")
    ends.server.ping(b"12345678")
    ends.frames.add(call, b"second")
    ends.server.send_headers(call, [(b"grpc-status", b"0")], end_stream=True)
    kinds = [type(event).__name__ for event in ends.deliver()]
    wanted = [
        "ResponseReceived",
        "DataReceived",
        "PingReceived",
        "DataReceived",
        "TrailersReceived",
        "StreamEnded",
    ]
    assert [kind for kind in kinds if kind in wanted] == wanted


def test_a_frame_is_no_longer_than_the_client_takes():
    ends = Ends(window=60_000)
    (call,) = ends.calls
    assert ends.frames.add(call, b"x" * 50_000) == b""
    sizes = [len(e.data) for e in ends.deliver() if isinstance(e, h2.events.DataReceived)]
    assert sizes == [16_384, 16_384, 16_384, 848]
