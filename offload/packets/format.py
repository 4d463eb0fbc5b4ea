"""The packet file (.opk), version 1: what every byte means.

One append-only file holds the packets of many sources. It is its own registry: where each source was read up to
stands in the same checksummed frame as the bytes, so data and offset cannot disagree. There is no second file. Where
it is written in segments, each is such a file, and the newest alone is enough to go on (see the end of this page).

Everything is little-endian. Each frame is a 64-byte header and then `payload_len` bytes:

    offset size field
         0    4 magic         FF 4F 50 4B; 0xFF never occurs in UTF-8, so a scan has no false start in text
         4    1 version       1
         5    1 type          a FrameType
         6    2 flags         a Flag set
         8    4 payload_len   stored bytes after the header, at most 16 MiB
        12    4 source_id     dense, defined by a SOURCE frame; 0 in FILE and COMMIT
        16    8 seq           number of the first line or packet of this source, over all its generations
        24    8 source_off    byte offset of the payload's first byte in this generation of the source
        32    8 time_ns       arrival time, Unix nanoseconds
        40    4 count         lines or packets that end in this payload
        44    4 payload_crc   CRC-32 (RFC 1952, section 8) of the stored payload
        48    4 generation    0, 1, 2 … of the source: a rename keeps it, a truncation or a new inode adds 1
        52    4 prev_len      length of the frame before, header included; 0 in the first: a walk back from the end
        56    4 epoch         random id of the writer's run: stale bytes never pass for new ones
        60    4 header_crc    CRC-32 of bytes 0 to 59: a damaged length is never followed

Line k of a LINES frame is packet (source_id, seq + k). A frame holds a run of whole lines, however many, for 64 bytes.
`seq` is always the sum of the counts before it, so a reader proves that nothing is missing by adding. (Lines that were
counted and then lost in a damaged packet file are counted by the GAP in their place, reason DAMAGED: see `repair`.)

Lines that do not end in their frame:
    FIRST, MIDDLE, LAST   pieces of one line longer than a frame. FIRST and MIDDLE count 0, LAST counts 1.
    UNTERMINATED          the source ended inside this line when it was read. It counts as a line (it may be the last
                          one ever), so a rest that appears later comes as MIDDLE|UNTERMINATED or LAST and counts 0.
    A new generation ends an open line. In a FIRST..MIDDLE run that ends UNTERMINATED, that last piece counts 1.
    Of these flags only MIDDLE and UNTERMINATED stand together.
    HOLE                  stands alone: the source has a long run of NULs here (a sparse file, a truncation under a
                          writer without O_APPEND). The payload is its length, u64, and its bytes are not stored. It
                          counts 0 and neither begins nor ends a line: one that is open goes on behind it.

Payloads (STRUCT below, then the variable part):
    FILE     file id, segment number, chain of the segment before; then what wrote it, UTF-8.
    SOURCE   device, inode, birth time (0: unknown), start offset, compression; in a generation over 0 an entry as in
             COMMIT, which says how the generation before ended; then the path's bytes. Written when a source or a
             generation of it begins. With compression, all offsets count unpacked bytes. A generation whose start
             offset is where an earlier one of the same device and inode ended goes on with that file: lines that came
             late to a file that had lost its name, or the return from there to the file that has it. One whose start
             offset is before that end, and not 0, goes on in a file that had lost its end (see GAP): what the file has
             before it stands in the earlier generation.
    LINES    the source's bytes, verbatim.
    PACKETS  one packet, or with TABLE `count` u32 lengths and then the packets' bytes. `source_off` counts the bytes
             of the packets alone.
    COMMIT   durable_upto (at most its own offset), offset of the COMMIT before (NONE_U64: first), lines in the file so
             far, chain, entries, whether it lists all sources; then an entry for each source changed since the COMMIT
             before (all of them every 64 MiB).
    GAP      source range [from, to) that nobody can recover (from: as `source_off`; to NONE_U64: unknown), best count
             of lines (NONE_U64: unknown), reason. Bytes that are lost are stated, never passed over. REGRESSION: the
             source became shorter than what is here of it, as after a power cut of its machine, and went on; the next
             generation begins where it and the bytes here part, so they are here once. With `to` at `from` nothing is
             lost that anybody knows of.
    INDEX    places of COMMITs in this segment, at least INDEX_STEP bytes apart: for each, the differences to the one
             before (the first: to 0) of its offset, its time_ns and the lines before it, as LEB128, the time zigzag.
    SEAL     offset of the first INDEX frame (NONE_U64: none), lines in this segment, time_ns of its FILE frame, chain.
             The last frame of a segment; before it stand a COMMIT that lists all sources and the INDEX frames. (One
             without a payload closes nothing, and a wrong INDEX is no fault: files from before segments may have both.)

A COMMIT's entry holds all that a writer needs to go on: generation, resume offset, next seq, size and mtime, hash and
length of the head (first bytes, at most HEAD_BYTES) and of the tail guard (bytes before the resume offset, at most
GUARD_BYTES), and where its SOURCE frame stands. Hashes are BLAKE2b-128. The chain is SHA-256 over the chain before and
the headers (they hold the payloads' CRCs) of all frames since the COMMIT before. It begins with the chain that FILE
states: that of the segment before as of its SEAL's header, or 32 NULs in segment 0. A SEAL states it as COMMITs do.

Segments. A segment that is sealed is the same bytes with an INDEX and a SEAL behind them, and never changes. The next
one has the same file id and a segment number that is one more; all offsets and counts of lines begin anew in it, `seq`
and generations go on. Before its first COMMIT it states each source again, in the order of their ids, by SOURCE frames
with the flag RESTATED: the generation that the source is at, and before it some of the generations before that one.

    RESTATED  this SOURCE begins nothing: the generation began in an earlier segment. `seq` and `source_off` say where
              it stands (or ended), and behind the entry of the generation before (which is there in generations over 0)
              comes one of this generation as it stands. In an entry of a generation that is not stated in this segment
              `source_frame` is NONE_U64.

A reader that has the segment before finds the same states there; one that has not begins with them. The flag is one
that readers from before segments refuse, with its number; they read files that have none as ever.

Why some fields stand where they do:
    - The head's hash stands in COMMIT entries, not in SOURCE: it grows with the file, a SOURCE frame does not.
    - COMMIT points back to the COMMIT before and to the SOURCE frames, and the guard states its length, so that
      recovery reads a few frames from the end however large the file is.
    - UNTERMINATED can be continued (see above): a file read by `merge` twice keeps its lines whole.
    - SOURCE holds the last entry of the generation before, not its number, which is always one less. Walking back from
      a source's newest SOURCE frame over `source_frame` gives every earlier generation's device, inode, end, head and
      guard. So a rotated file that a glob finds again under its new name (app.log.1) is known after a restart, and is
      not read twice.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

MAGIC = b"\xffOPK"
VERSION = 1
HEADER = struct.Struct("<4sBBHIIQQQIIIIII")
HEADER_BYTES = HEADER.size
HEADER_CRC = struct.Struct("<I")
HEADER_CRC_AT = HEADER_BYTES - HEADER_CRC.size
MAX_PAYLOAD = 16 << 20

NONE_U64 = 0xFFFF_FFFF_FFFF_FFFF

HEAD_BYTES = 1024
GUARD_BYTES = 256
DIGEST_BYTES = 16

FILE_STRUCT = struct.Struct("<16sI32s")
SOURCE_STRUCT = struct.Struct("<QQQQB7x")
SEAL_STRUCT = struct.Struct("<QQQ32s")
COMMIT_STRUCT = struct.Struct("<QQQ32sIB3x")
ENTRY_STRUCT = struct.Struct("<IIQQQQQHHI16s16s")
GAP_STRUCT = struct.Struct("<QQQB7x")
HOLE_STRUCT = struct.Struct("<Q")

INDEX_STEP = 1 << 20  # what lies between two places is as well searched
FULL_COMMIT_BYTES = 64 << 20  # a COMMIT at least this often lists all sources, which bounds the walk back in recovery


class FrameType(IntEnum):
    FILE = 0
    LINES = 1
    PACKETS = 2
    SOURCE = 3
    COMMIT = 4
    GAP = 5
    INDEX = 6  # its content is not needed to read the file: it only shortens the search for a time (`merge/seek.py`)
    SEAL = 7
    NOTE = 8


class Flag(IntFlag):
    NONE = 0
    FIRST = 1
    MIDDLE = 2
    LAST = 4
    UNTERMINATED = 8
    TABLE = 16
    ZSTD = 32
    HOLE = 64
    RESTATED = 128


class EntryFlag(IntFlag):
    NONE = 0
    OPEN_FRAGMENT = 1  # the last frame was FIRST or MIDDLE: the line goes on and has not been counted
    OPEN_LINE = 2  # the last frame was UNTERMINATED: if the source grows, the line goes on and has been counted


class GapReason(IntEnum):
    TRUNCATED = 1
    UNLINKED = 2
    GIVEN_UP = 3
    REGRESSION = 4
    DAMAGED = 5  # our own copy is damaged and the source no longer has the bytes


class Compression(IntEnum):
    NONE = 0
    GZIP = 1
    XZ = 2
    ZSTD = 3
