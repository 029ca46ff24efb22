"""Carries Ethernet frames between two taps, and delays, repeats, reorders and spoils them on the way.

A program of its own, so that the load of the test run does not hold it up: `relay.py TAP TAP SEED`. It says when the
taps are there. Every line on its input is then a JSON object of faults that count from there on, or empty, and is
answered with a line of counters; from the first one, when both taps are up, frames are carried. It ends with its
input, so never outlives whoever started it. Says itself how late it was.
"""

import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
FRAME_BYTES_MAX = 2048
# Frames that may be under way in one direction; the next one is dropped and counted.
QUEUE_MAX = 20_000
# Frames read from one side before the other one is looked at.
BATCH = 64
# Without a frame on its way, it looks at its input only.
IDLE_SECONDS = 1.0
ETHERNET_BYTES, IPV4_BYTES = 14, 20
COUNTED = ("frames", "delayed", "delay_ms", "duplicated", "overtaken", "corrupted", "overflowed", "late_ms", "late_ms_max")
FAULTS = {"delay_ms": 0.0, "jitter_ms": 0.0, "in_order": True, "duplicate": 0.0, "corrupt": 0.0}


def open_tap(name):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return fd


class Direction:
    """From one tap to the other. Frames wait in a heap until they are due."""

    def __init__(self, source, sink, chance, counts):
        self.source, self.sink, self.chance, self.counts = source, sink, chance, counts
        # (due, number, frame)
        self.waiting = []
        self.number, self.latest, self.last_due = 0, -1, 0.0

    def read(self, faults):
        for _ in range(BATCH):
            try:
                frame = os.read(self.source, FRAME_BYTES_MAX)
            except BlockingIOError:
                return
            self.take(frame, faults)

    def take(self, frame, faults):
        self.counts["frames"] += 1
        if faults["corrupt"] and self.chance.random() < faults["corrupt"]:
            frame = self.spoil(frame)
        copies = 1
        if faults["duplicate"] and self.chance.random() < faults["duplicate"]:
            copies = 2
            self.counts["duplicated"] += 1
        for _ in range(copies):
            self.queue(frame, faults)

    def queue(self, frame, faults):
        if len(self.waiting) >= QUEUE_MAX:
            self.counts["overflowed"] += 1
            return
        now = time.monotonic()
        delay = faults["delay_ms"] + faults["jitter_ms"] * self.chance.uniform(-1, 1)
        due = now + max(0.0, delay) / 1000
        if faults["in_order"]:
            due = max(due, self.last_due)
        self.last_due = due
        if due > now:
            self.counts["delayed"] += 1
            self.counts["delay_ms"] += (due - now) * 1000
        heapq.heappush(self.waiting, (due, self.number, frame))
        self.number += 1

    def spoil(self, frame):
        """Flips one bit behind the headers of Ethernet and IPv4: what TCP's checksum, and nobody else, looks at."""
        begin = ETHERNET_BYTES + IPV4_BYTES
        if frame[12:14] != b"\x08\x00" or len(frame) <= begin:
            return frame
        self.counts["corrupted"] += 1
        at = self.chance.randrange(begin, len(frame))
        return frame[:at] + bytes([frame[at] ^ 1 << self.chance.randrange(8)]) + frame[at + 1 :]

    def write_due(self):
        now = time.monotonic()
        while self.waiting and self.waiting[0][0] <= now:
            due, number, frame = heapq.heappop(self.waiting)
            try:
                os.write(self.sink, frame)
            except BlockingIOError:
                self.counts["overflowed"] += 1
                continue
            late = (time.monotonic() - due) * 1000
            self.counts["late_ms"] += late
            self.counts["late_ms_max"] = max(self.counts["late_ms_max"], late)
            if number < self.latest:
                self.counts["overtaken"] += 1
            self.latest = max(self.latest, number)

    def hurry(self):
        """What waits is due now, in the order in which it came."""
        self.waiting = [(0.0, number, frame) for number, frame in sorted(w[1:] for w in self.waiting)]
        self.last_due = 0.0
        while self.waiting:
            os.write(self.sink, heapq.heappop(self.waiting)[2])


def main(one, other, seed):
    ends = [open_tap(one), open_tap(other)]
    counts = dict.fromkeys(COUNTED, 0)
    chance = random.Random(seed)
    directions = [Direction(*pair, chance, counts) for pair in (ends, ends[::-1])]
    answer(counts)
    faults = None
    # Taps that are not up yet take no frames.
    watched = [sys.stdin.fileno()]
    while True:
        dues = [d.waiting[0][0] for d in directions if d.waiting]
        wait = max(0.0, min(dues) - time.monotonic()) if dues else IDLE_SECONDS
        ready, _, _ = select.select(watched, [], [], wait)
        for direction in directions:
            if direction.source in ready:
                direction.read(faults)
            direction.write_due()
        if watched[0] in ready:
            line = sys.stdin.readline()
            if not line:
                return
            if faults is None or line.strip():
                faults = {**FAULTS, **json.loads(line.strip() or "{}")}
                watched[1:] = ends
                for direction in directions:
                    direction.hurry()
            answer(counts)


def answer(counts):
    print(json.dumps({**counts, "cpu_s": time.process_time()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
