"""A label's checked form and its wire form: what passes, what is refused, and in which words."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import ujson
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sse_labels.errors import InvalidLabel
from sse_labels.protocol import formats
from sse_labels.protocol.formats import (
    expires_at,
    is_at_uri,
    is_cid,
    is_datetime,
    is_did,
    is_expired,
    is_uri,
    is_val,
    shown,
    unsafe_in,
)
from sse_labels.protocol.label import LABEL_TYPE, Label, check_subject, label_json, parse_label

CID = "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"

LEAST: dict[str, Any] = {
    "src": "did:plc:ewvi7nxzyoun6zhxrhs64oiz",
    "uri": "at://did:plc:7iza6de2dwap2sbkpav7c6c6/app.bsky.feed.post/3jzfcijpj2z2a",
    "val": "spam",
    "cts": "2024-05-01T12:00:00.000Z",
}
WHOLE: dict[str, Any] = {
    "$type": "com.atproto.label.defs#label",
    "ver": 1,
    **LEAST,
    "cid": CID,
    "neg": True,
    "exp": "2025-05-01T12:00:00+02:00",
    "sig": {"$bytes": "3q2+7w"},
}

# Strings that every implementation of the AT Protocol must accept, or must refuse. The values are
# those of `interop-test-files/syntax/*_syntax_{valid,invalid}.txt` and `datetime_parse_invalid.txt`
# (bluesky-social/atproto, as of 2026-08-20), and of `atproto/syntax/testdata` (bluesky-social/
# indigo), which has a few more datetimes, and the files of CIDs and URIs, which the first has not.

DIDS = (
    "did:m:v",
    "did:method:val",
    "did:method:VAL",
    "did:method:val123",
    "did:method:123",
    "did:method:val-two",
    "did:method:val_two",
    "did:method:val.two",
    "did:method:val:two",
    "did:method:val%BB",
    "did:method:" + "v" * 241,
    "did:method::::val",
    "did:method:-",
    "did:method:-:_:.:%ab",
    "did:method:.",
    "did:method:_",
    "did:method::.",
    "did:onion:2gzyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid",
    "did:example:123456789abcdefghi",
    "did:plc:7iza6de2dwap2sbkpav7c6c6",
    "did:web:example.com",
    "did:web:localhost%3A1234",
    "did:key:zQ3shZc2QzApp2oymGvQbzP8eKheVshBHbU4ZYjeXqwSKEn6N",
    "did:ethr:0xb9c5714089478a327f09197987f16f9e5d936e8a",
    # The limit itself.
    "did:method:" + "v" * (2048 - 11),
)
NO_DIDS = (
    "",
    "did",
    "didmethodval",
    "method:did:val",
    "did:method:",
    "didmethod:val",
    "did:methodval)",
    ":did:method:val",
    "did.method.val",
    "did:method:val:",
    "did:method:val%",
    "DID:method:val",
    "did:METHOD:val",
    "did:m123:val",
    "did:method:val/two",
    "did:method:val?two",
    "did:method:val#two",
    "did:method:" + "v" * (2049 - 11),
    "did:method:" + "v" * 2492,
    # Not in those files: what Python's `$`, `\d` and `\w` would let through.
    "did:method:val\n",
    "did:method:välue",
    "did:méthod:val",
)

DATETIMES = (
    # Preferred.
    "1985-04-12T23:20:50.123Z",
    "1985-04-12T23:20:50.000Z",
    "2000-01-01T00:00:00.000Z",
    "1985-04-12T23:20:50.123456Z",
    "1985-04-12T23:20:50.120Z",
    "1985-04-12T23:20:50.100Z",
    "1985-04-12T23:20:50.120000Z",
    # Supported.
    "1985-04-12T23:20:50.1235678912345Z",
    "1985-04-12T23:20:50Z",
    "1985-04-12T23:20:50.0Z",
    "1985-04-12T23:20:50.123+00:00",
    "1985-04-12T23:20:50.123-07:00",
    "1985-04-12T23:20:50.123+07:00",
    "1985-04-12T23:20:50.123+01:45",
    "0985-04-12T23:20:50.123-07:00",
    "0123-01-01T00:00:00.000Z",
    # Every precision up to 12 digits.
    *(f"1985-04-12T23:20:50.{'123456789012'[:digits]}Z" for digits in range(1, 13)),
    # Extreme, and allowed.
    "0000-01-01T00:00:00.000Z",
    "0001-01-01T00:00:00.000Z",
    "0010-12-31T23:00:00.000Z",
    "1000-12-31T23:00:00.000Z",
    "1900-12-31T23:00:00.000Z",
    "3001-12-31T23:00:00.000Z",
    # Not in those files: the edges of the years, of the leap years, and of the length.
    "0000-01-01T00:00:00-00:01",
    "0000-01-01T01:00:00+01:00",
    "0000-01-01T23:59:59-01:00",
    "0000-02-29T00:00:00Z",
    "9999-12-31T23:59:59Z",
    "9999-12-31T22:59:59-01:00",
    "9999-12-31T00:00:00+01:00",
    "2000-02-29T00:00:00Z",
    "2024-02-29T00:00:00Z",
    "2024-04-30T23:59:59+23:59",
    "2024-01-31T00:00:00." + "0" * 43 + "Z",
)
NO_DATETIMES = (
    "",
    # One character wrong.
    "1985-04-12T23:20:50.123z",
    "1985-04-12t23:20:50.123Z",
    "01985-04-12T23:20:50.123Z",
    "985-04-12T23:20:50.123Z",
    "1985-04-12T23:20:50.Z",
    "1985-04-32T23;20:50.123Z",
    "1985—04-32T23;20:50.123Z",
    "1985–04-32T23;20:50.123Z",
    "1985-04-12_23:20:50.123Z",
    "1985-04-12 23:20:50.123Z",
    # White space.
    " 1985-04-12T23:20:50.123Z",
    "1985-04-12T23:20:50.123Z ",
    "1985-04-12T 23:20:50.123Z",
    # A digit too few or too many.
    "1985-4-12T23:20:50.123Z",
    "1985-04-2T23:20:50.123Z",
    "1985-04-12T3:20:50.123Z",
    "1985-04-12T23:0:50.123Z",
    "1985-04-12T23:20:5.123Z",
    "1985-004-12T23:20:50.123Z",
    "1985-04-012T23:20:50.123Z",
    "1985-04-12T023:20:50.123Z",
    "1985-04-12T23:020:50.123Z",
    "1985-04-12T23:20:050.123Z",
    "1985-04-274T23:20:50.123Z",
    # Without seconds, without time, without date.
    "1985-04-12",
    "1985-04-12T23:20Z",
    "1985-04-12T23:20:5Z",
    "23:20:50.123Z",
    "+001985-04-12T23:20:50.123Z",
    "-000001-12-31T23:00:00.000Z",
    # Without a whole time zone.
    "1985-04-12T23:20:50",
    "1985-04-12T23:20:50.123",
    "1985-04-12T23:20:50.123+",
    "1985-04-12T23:20:50.123-",
    "1985-04-12T23:20:50.123+00",
    "1985-04-12T23:20:50.123+00:0",
    "1985-04-12T23:20:50.123+0:00",
    "1985-04-12T23:20:50.123+0000",
    # RFC 3339 has it for "unknown local offset", ISO 8601 has not.
    "1985-04-12T23:20:50.123-00:00",
    # Well-formed, and no such moment.
    "1985-00-12T23:20:50.123Z",
    "1985-04-00T23:20:50.123Z",
    "1985-13-12T23:20:50.123Z",
    "1985-04-12T25:20:50.123Z",
    "1985-04-12T23:99:50.123Z",
    "1985-04-12T23:20:61.123Z",
    "1985-04-12T23:20:60Z",
    "1985-02-29T23:20:50.123Z",
    # Before the year 0 in UTC.
    "0000-01-01T00:00:00+01:00",
    # Not in those files.
    "1900-02-29T00:00:00Z",
    "2023-04-31T00:00:00Z",
    "2024-02-30T00:00:00Z",
    "2016-12-31T23:59:60Z",
    "2024-05-01T24:00:00Z",
    "2024-05-01T12:00:00+24:00",
    "2024-05-01T12:00:00+01:60",
    "0000-01-01T00:59:59+01:00",
    "9999-12-31T23:00:00-01:00",
    "9999-12-31T23:59:59-00:01",
    "2024-05-01T12:00:00Z\n",
    "2024-05-01T12:00:00,5Z",
    "٢٠٢٤-٠٥-٠١T١٢:٠٠:٠٠Z",
    "2024-01-31T00:00:00." + "0" * 44 + "Z",
)

CIDS = (
    CID,
    "zdj7WWeQ43G6JJvLWQWZpyHuAMq6uYWRjkBXFad11vE2LHhQ7",
    "bafybeie5gq4jxvzmsym6hjlwxej4rwdoxt7wadqvmmwbqi7r27fclha2va",
    "mBcDxtdWx0aWhhc2g+",
    "z7x3CtScH765HvShXT",
    "zdj7WhuEjrB52m1BisYCtmjH1hSKa7yZ3jEZ9JcXaFRD51wVz",
    "7134036155352661643226414134664076",
    "f017012202c5f688262e0ece8569aa6f94d60aad55ca8d9d83734e4a7430d0cff6588ec2b",
    "b" * 256,
)
NO_CIDS = (
    "",
    "example.com",
    "https://example.com",
    f"cid:{CID}",
    ".",
    "12345",
    f" {CID}",
    f"{CID} ",
    f"{CID}\n",
    "bafybe igdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi",
    "QmbWqxBEKC3P8tqsKc98xmWNzrzDtRLMiMPL8wBuTGsMnR",
    "noop",
    "b" * 257,
)

URIS = (
    "https://example.com",
    "https://example.com/path?q=blah&yes=true#frag.123",
    "dns:example.com",
    "at://handle.example.com/nsid/rkey",
    "did:key:zQ3shZc2QzApp2oymGvQbzP8eKheVshBHbU4ZYjeXqwSKEn6N",
    "content-type:text/plan",
    "microsoft.windows.camera:thing",
    "go://?Mercedes%20Benz",
    "https://example.com/" + "x" * 5000,
    # Not in those files: RFC 3986, section 3.1, and the limit itself.
    "h323+x-1.2:user",
    "file:///etc/hosts",
    "https://example.com/" + "x" * (8192 - 20),
)
NO_URIS = (
    "",
    "example.com",
    "://example.com",
    "//example.com",
    "http:",
    ".http://example.com",
    "-http://example.com",
    "12345",
    "127.0.0.1",
    "https://example.com/path gap",
    "  https://example.com/path",
    "https://example.com/trailing-whitespace  ",
    "https://example.com/" + "x" * (8193 - 20),
    "https://example.com/" + "x" * 8200,
    # Not in those files.
    "at://",
    "1http://example.com",
    "https://example.com/\n",
    "https://example.com/ä",
    "https://example.com/\u2028",
)

AT_URIS = (
    "at://did:plc:asdf123",
    "at://user.bsky.social",
    "at://did:plc:asdf123/com.atproto.feed.post",
    "at://did:plc:asdf123/com.atproto.feed.post/record",
    "at://did:plc:asdf123/com.atproto.feed.post/" + "o" * 512,
    "at://did:plc:asdf123/com.atproto.feed.post/asdf123",
    "at://did:plc:asdf123/com.atproto.feed.post/a",
    "at://did:plc:asdf123/com.atproto.feed.post/asdf-123",
    "at://did:abc:123",
    "at://did:abc:123/io.nsid.someFunc/record-key",
    "at://did:abc:123/io.nsid.someFunc/self.",
    "at://did:abc:123/io.nsid.someFunc/lang:",
    "at://did:abc:123/io.nsid.someFunc/:",
    "at://did:abc:123/io.nsid.someFunc/-",
    "at://did:abc:123/io.nsid.someFunc/_",
    "at://did:abc:123/io.nsid.someFunc/~",
    "at://did:abc:123/io.nsid.someFunc/...",
    "at://did:plc:asdf123/com.atproto.feed.postV2",
    # Not in those files: the longest that there can be.
    "at://did:plc:"
    + "x" * (2048 - 8)
    + "/"
    + ".".join(["a" * 63] * 4 + ["b" * 61])
    + "/"
    + "o" * 512,
)

NO_AT_URIS = (
    "a://did:plc:asdf123",
    "at//did:plc:asdf123",
    "at:/a/did:plc:asdf123",
    "at:/did:plc:asdf123",
    "AT://did:plc:asdf123",
    "http://did:plc:asdf123",
    "://did:plc:asdf123",
    "at:did:plc:asdf123",
    "at:///did:plc:asdf123",
    "at://:/did:plc:asdf123",
    "at:/ /did:plc:asdf123",
    "at://did:plc:asdf123 ",
    "at://did:plc:asdf123/ ",
    " at://did:plc:asdf123",
    "at://did:plc:asdf123/com.atproto.feed.post ",
    "at://did:plc:asdf123/com.atproto.feed.post# ",
    "at://did:plc:asdf123/com.atproto.feed.post#/ ",
    "at://did:plc:asdf123/com.atproto.feed.post#/frag ",
    "at://did:plc:asdf123/com.atproto.feed.post#fr ag",
    "//did:plc:asdf123",
    "at://name",
    "at://name.0",
    "at://diD:plc:asdf123",
    "at://did:plc:asdf123/com.atproto.feed.p@st",
    "at://did:plc:asdf123/com.atproto.feed.p$st",
    "at://did:plc:asdf123/com.atproto.feed.p%st",
    "at://did:plc:asdf123/com.atproto.feed.p&st",
    "at://did:plc:asdf123/com.atproto.feed.p()t",
    "at://did:plc:asdf123/com.atproto.feed_post",
    "at://did:plc:asdf123/-com.atproto.feed.post",
    "at://did:plc:asdf@123/com.atproto.feed.post",
    "at://DID:plc:asdf123",
    "at://user.bsky.123",
    "at://bsky",
    "at://did:plc:",
    "at://frag",
    "at://did:plc:asdf123/com.atproto.feed.post/" + "o" * 8200,
    "at://user.bsky.social//",
    "at://user.bsky.social//com.atproto.feed.post",
    "at://user.bsky.social/com.atproto.feed.post//",
    "at://did:plc:asdf123/com.atproto.feed.post/asdf123/more/more',",
    "at://did:plc:asdf123/short/stuff",
    "at://did:plc:asdf123/12345",
    "at://did:plc:asdf123/",
    "at://user.bsky.social/",
    "at://did:plc:asdf123/com.atproto.feed.post/",
    "at://did:plc:asdf123/com.atproto.feed.post/record/",
    "at://did:plc:asdf123/com.atproto.feed.post/record/#/frag",
    "at://did:plc:asdf123/com.atproto.feed.post/asdf123/asdf",
    "at://did:plc:asdf123#",
    "at://did:plc:asdf123##",
    "#at://did:plc:asdf123",
    "at://did:plc:asdf123#/asdf#/asdf",
    "at://did:plc:asdf123/com.atproto.feed.post/%23",
    "at://did:plc:asdf123/com.atproto.feed.post/$@!*)(:,;~.sdf123",
    "at://did:plc:asdf123/com.atproto.feed.post/~'sdf123\")",
    "at://did:plc:asdf123/com.atproto.feed.post/$",
    "at://did:plc:asdf123/com.atproto.feed.post/@",
    "at://did:plc:asdf123/com.atproto.feed.post/!",
    "at://did:plc:asdf123/com.atproto.feed.post/*",
    "at://did:plc:asdf123/com.atproto.feed.post/(",
    "at://did:plc:asdf123/com.atproto.feed.post/,",
    "at://did:plc:asdf123/com.atproto.feed.post/;",
    "at://did:plc:asdf123/com.atproto.feed.post/abc%30123",
    "at://did:plc:asdf123/com.atproto.feed.post/%30",
    "at://did:plc:asdf123/com.atproto.feed.post/%3",
    "at://did:plc:asdf123/com.atproto.feed.post/%",
    "at://did:plc:asdf123/com.atproto.feed.post/%zz",
    "at://did:plc:asdf123/com.atproto.feed.post/%%%",
    "at://did:plc:asdf123/com.atproto.feed.post/.",
    "at://did:plc:asdf123/com.atproto.feed.post/..",
    # Not in those files: names no collection, cannot be cut from a URL, and the limits.
    "at://handle.example.com/nsid/rkey",
    "at://did:plc:asdf123/com.atproto.feed.post?query",
    "at://did:plc:asdf123?query",
    "at://did:plc:asdf123\n",
    "at://did:plc:asdf123/com.atproto.feed.post\n",
    "at://did:plc:asdf123/com.atproto.feed.post/a\n",
    "at://did:plc:" + "x" * (2049 - 8),
    "at://did:plc:asdf123/" + ".".join(["a" * 63] * 4 + ["b" * 62]),
)

# The parts of an AT-URI: `handle_`, `nsid_` and `recordkey_syntax_{valid,invalid}.txt`.

HANDLES = (
    "A.ISI.EDU",
    "XX.LCS.MIT.EDU",
    "SRI-NIC.ARPA",
    "john.test",
    "jan.test",
    "a234567890123456789.test",
    "john2.test",
    "john-john.test",
    "john.bsky.app",
    "jo.hn",
    "a.co",
    "a.org",
    "joh.n",
    "j0.h0",
    "jaymome-johnber123456.test",
    "jay.mome-johnber123456.test",
    "john.test.bsky.app",
    "shoooort" + ".loooooooooooooooooooooooooong" * 8 + ".test",
    "short." + "o" * 63 + ".test",
    "john.t",
    "laptop.local",
    "laptop.arpa",
    "xn--ls8h.test",
    "xn--bcher-kva.tld",
    "xn--3jk.com",
    "xn--w3d.com",
    "xn--vqb.com",
    "xn--ppd.com",
    "xn--cs9a.com",
    "xn--8r9a.com",
    "xn--cfd.com",
    "xn--5jk.com",
    "xn--2lb.com",
    "expyuzz4wqqyqhjn.onion",
    "friend.expyuzz4wqqyqhjn.onion",
    "g2zyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.onion",
    "friend.g2zyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.onion",
    "2gzyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.onion",
    "friend.2gzyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.onion",
    "12345.test",
    "8.cn",
    "4chan.org",
    "4chan.o-g",
    "blah.4chan.org",
    "thing.a01",
    "120.0.0.1.com",
    "0john.test",
    "9sta--ck.com",
    "99stack.com",
    "0ohn.test",
    "john.t--t",
    "thing.0aa.thing",
    "stack.com",
    "sta-ck.com",
    "sta---ck.com",
    "sta--ck9.com",
    "stack99.com",
    "sta99ck.com",
    "google.com.uk",
    "google.co.in",
    "google.com",
    "maselkowski.pl",
    "m.maselkowski.pl",
    "xn--masekowski-d0b.pl",
    "xn--fiqa61au8b7zsevnm8ak20mc4a87e.xn--fiqs8s",
    "xn--stackoverflow.com",
    "stackoverflow.xn--com",
    "stackoverflow.co.uk",
)

NO_HANDLES = (
    "did:thing.test",
    "did:thing",
    "john-.test",
    "john.0",
    "john.-",
    "xn--bcher-.tld",
    "john..test",
    "jo_hn.test",
    "-john.test",
    ".john.test",
    "jo!hn.test",
    "jo%hn.test",
    "jo&hn.test",
    "jo@hn.test",
    "jo*hn.test",
    "jo|hn.test",
    "jo:hn.test",
    "jo/hn.test",
    "john💩.test",
    "bücher.test",
    "john .test",
    "john.test.",
    "john",
    "john.",
    ".john",
    " john.test",
    "john.test ",
    "joh-.test",
    "john.-est",
    "john.tes-",
    "shoooort" + ".loooooooooooooooooooooooooong" * 9 + ".test",
    "short." + "o" * 64 + ".test",
    "org",
    "ai",
    "gg",
    "io",
    "cn.8",
    "thing.0aa",
    "127.0.0.1",
    "192.168.0.142",
    "fe80::7325:8a97:c100:94b",
    "2600:3c03::f03c:9100:feb0:af1f",
    "-notvalid.at-all",
    "-thing.com",
    "www.masełkowski.pl.com",
)

NSIDS = (
    "com." + "o" * 63 + ".foo",
    "com.example." + "o" * 63,
    "com" + ".middle" * 40 + ".foo",
    "com.example.fooBar",
    "com.example.fooBarV2",
    "net.users.bob.ping",
    "a.b.c",
    "m.xn--masekowski-d0b.pl",
    "one.two.three",
    "one.two.three.four-and.FiVe",
    "one.2.three",
    "a-0.b-1.c",
    "a0.b1.cc",
    "cn.8.lex.stuff",
    "test.12345.record",
    "a01.thing.record",
    "a.0.c",
    "xn--fiqs8s.xn--fiqa61au8b7zsevnm8ak20mc4a87e.record.two",
    "a0.b1.c3",
    "com.example.f00",
    "onion.expyuzz4wqqyqhjn.spec.getThing",
    "onion.g2zyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.lex.deleteThing",
    "org.4chan.lex.getThing",
    "onion.2gzyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.lex.deleteThing",
)

NO_NSIDS = (
    "com." + "o" * 64 + ".foo",
    "com.example." + "o" * 64,
    "com" + ".middle" * 50 + ".foo",
    "com.example.foo.*",
    "com.example.foo.blah*",
    "com.example.foo.*blah",
    "com.exa💩ple.thing",
    "a-0.b-1.c-3",
    "a-0.b-1.c-o",
    "1.0.0.127.record",
    "0two.example.foo",
    "example.com",
    "com.example",
    "a.",
    ".one.two.three",
    "one.two.three ",
    "one.two..three",
    "one .two.three",
    " one.two.three",
    "com.atproto.feed.p@st",
    "com.atproto.feed.p_st",
    "com.atproto.feed.p*st",
    "com.atproto.feed.po#t",
    "com.atproto.feed.p!ot",
    "com.example-.foo",
    "com.example.fooBar.2",
)

RECORD_KEYS = (
    "self",
    "example.com",
    "~1.2-3_",
    "dHJ1ZQ",
    "_",
    "literal:self",
    "pre:fix",
    ":",
    "-",
    "~",
    "...",
    "self.",
    "lang:",
    ":lang",
    "o" * 512,
)

NO_RECORD_KEYS = (
    "alpha/beta",
    ".",
    "..",
    "#extra",
    "@handle",
    "any space",
    "any+space",
    "number[3]",
    "number(3)",
    '"quote"',
    "dHJ1ZQ==",
    "o" * 513,
)

FORMATS: dict[str, tuple[Callable[[str], bool], tuple[str, ...], tuple[str, ...]]] = {
    "a DID": (is_did, DIDS, NO_DIDS),
    "a datetime": (is_datetime, DATETIMES, NO_DATETIMES),
    "a CID": (is_cid, CIDS, NO_CIDS),
    "a URI": (is_uri, URIS, NO_URIS),
    "an AT-URI": (is_at_uri, AT_URIS, NO_AT_URIS),
    # Measured in UTF-8: 1 to 128 bytes.
    "a value": (
        is_val,
        ("a", "!hide", "with space", "ünïcode", "v" * 128, "ä" * 64, "😀" * 32),
        ("", "v" * 129, "ä" * 65, "ä" * 128, "😀" * 33),
    ),
}

#: Where a part of an AT-URI stands, what it may be there, and what not.
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "a handle": (("at://{}", "at://{}/com.example.post/self"), HANDLES, NO_HANDLES),
    "a DID": (
        ("at://{}/com.example.post/self",),
        DIDS,
        # One of them is a handle.
        tuple(text for text in NO_DIDS if text != "did.method.val"),
    ),
    "an NSID": (("at://did:plc:asdf123/{}", "at://did:plc:asdf123/{}/self"), NSIDS, NO_NSIDS),
    "a record key": (
        ("at://did:plc:asdf123/com.example.post/{}",), RECORD_KEYS, NO_RECORD_KEYS,
    ),
}  # fmt: skip

NO_STRINGS = (None, True, 1, 1.5, [], ["a"], {}, {"a": "b"})

UNSAFE = (
    *map(chr, range(0x20)),
    "\x7f",
    *map(chr, range(0x80, 0xA0)),
    "\u2028",
    "\u2029",
    "\ud800",
    "\udbff",
    "\udc00",
    "\udfff",
)


def brief(value: object) -> str:
    # Python refuses to spell out an int of more than 4300 digits.
    return "huge" if isinstance(value, int) and value > 10**9 else ascii(value)[:40]


def refusal(obj: object) -> InvalidLabel:
    with pytest.raises(InvalidLabel) as caught:
        parse_label(obj)
    # Whatever was sent, the answer is one short line that UTF-8 can encode.
    message = str(caught.value)
    assert len(message.encode()) < 500
    assert message.isprintable()
    return caught.value


class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    def test_it_accepts_what_is_of_the_format_and_nothing_else(self, name: str) -> None:
        accepts, good, bad = FORMATS[name]
        assert [text for text in good if not accepts(text)] == []
        assert [text for text in bad if accepts(text)] == []

    @pytest.mark.parametrize("part", PARTS)
    def test_an_at_uri_takes_in_each_place_what_belongs_there(self, part: str) -> None:
        forms, good, bad = PARTS[part]
        for form in forms:
            assert [text for text in good if not is_at_uri(form.format(text))] == []
            assert [text for text in bad if is_at_uri(form.format(text))] == []

    # Made of parts: what a pattern of this length gives takes half a minute.
    @given(
        st.tuples(
            st.sampled_from(DIDS + HANDLES), st.sampled_from(NSIDS),
            st.text(st.characters(max_codepoint=0x7F), min_size=1, max_size=20),
        ).map("/".join).map("at://".__add__)
        | st.sampled_from(AT_URIS + NO_AT_URIS).flatmap(
            lambda text: st.tuples(
                st.integers(0, len(text)), st.sampled_from("/.:#?%-_aZ0 \n") | st.just("")
            ).map(lambda cut: text[: cut[0]] + cut[1] + text[cut[0] + 1 :])
        )
    )  # fmt: skip
    def test_every_at_uri_is_a_uri(self, text: str) -> None:
        assert not is_at_uri(text) or is_uri(text)

    @pytest.mark.parametrize(
        "text",
        [
            *("at://did:" + "a" * 8000, "at://" + "a." * 4000, "at://" + "a-" * 4000),
            *("at://did:plc:a/" + "a." * 4000, "at://did:plc:a/" + "a-" * 4000 + "/"),
            "at://did:plc:a/a.b.c/" + "." * 8000,
        ],
        ids=brief,
    )
    def test_what_is_no_at_uri_is_refused_quickly_however_long_it_is(self, text: str) -> None:
        began = time.thread_time()
        assert not is_at_uri(text)
        assert time.thread_time() - began < 0.05

    def test_no_format_accepts_an_unsafe_character(self) -> None:
        for character in UNSAFE:
            texts = {
                is_val: f"a{character}b", is_did: f"did:plc:a{character}b",
                is_uri: f"https://a{character}b", is_cid: f"{CID}{character}",
                is_datetime: f"2024-05-01T12:00:00Z{character}",
            }  # fmt: skip
            assert [accepts for accepts, text in texts.items() if accepts(text)] == [], texts
            assert not is_at_uri(f"at://did:plc:a{character}b"), ascii(character)
            assert not is_at_uri(f"at://did:plc:ab{character}"), ascii(character)

    @given(st.text())
    def test_a_value_is_what_utf8_can_encode_in_1_to_128_bytes_without_controls(
        self, text: str
    ) -> None:
        unsafe = any(character in UNSAFE for character in text)
        assert is_val(text) == (not unsafe and 1 <= len(text.encode()) <= 128)

    @given(st.integers(1, 9999), st.integers(0, 13), st.integers(0, 32))
    def test_the_days_of_the_calendar_are_those_that_python_knows(
        self, year: int, month: int, day: int
    ) -> None:
        try:
            datetime(year, month, day)
        except ValueError:
            exists = False
        else:
            exists = True
        assert is_datetime(f"{year:04}-{month:02}-{day:02}T00:00:00Z") == exists

    # From the year 2 on, since Python has no year 0, and without what it reads all the same: the
    # hour 24 (from 3.13 on) and an offset whose minutes pass 59.
    @given(
        st.from_regex(
            r"(000[2-9]|0[1-9][0-9]{2}|[1-9][0-9]{3}|9999)-([01][0-9]-[0-3][0-9]|12-31)"
            r"T([01][0-9]|2[0-35-9]):[0-6][0-9]:[0-6][0-9](\.[0-9]{1,9})?(Z|[+-][0-2][0-9]:[0-5][0-9])",
            fullmatch=True,
        )
    )
    def test_a_well_formed_datetime_is_accepted_when_python_can_place_it_in_utc(
        self, text: str
    ) -> None:
        assume(text.isascii() and not text.endswith("-00:00"))
        try:
            datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError):
            assert not is_datetime(text)
        else:
            assert is_datetime(text)


class TestParsing:
    def test_a_label_with_the_required_fields_has_the_others_absent(self) -> None:
        assert parse_label(LEAST) == Label(
            LEAST["src"], LEAST["uri"], "", "spam", None, LEAST["cts"], None, None
        )

    def test_a_label_with_every_field_keeps_them_all(self) -> None:
        assert parse_label(WHOLE) == Label(
            src=LEAST["src"],
            uri=LEAST["uri"],
            cid=CID,
            val="spam",
            neg=True,
            cts=LEAST["cts"],
            exp="2025-05-01T12:00:00+02:00",
            sig=b"\xde\xad\xbe\xef",
        )

    def test_times_are_kept_as_given(self) -> None:
        for text in DATETIMES:
            label = parse_label({**LEAST, "cts": text, "exp": text})
            assert (label.cts, label.exp) == (text, text)

    def test_a_negation_that_is_false_is_told_from_one_that_is_absent(self) -> None:
        assert parse_label({**LEAST, "neg": False}).neg is False
        assert parse_label(LEAST).neg is None

    @pytest.mark.parametrize("obj", [None, True, 1, "label", [], [LEAST]], ids=brief)
    def test_what_is_no_object_is_refused_without_a_field(self, obj: object) -> None:
        error = refusal(obj)
        assert error.field == ""
        assert "expected a JSON object" in str(error)

    @pytest.mark.parametrize("field", ["src", "uri", "val", "cts"])
    def test_a_required_field_that_is_missing_is_named(self, field: str) -> None:
        error = refusal({name: value for name, value in LEAST.items() if name != field})
        assert error.field == field
        assert "is missing, expected" in str(error)

    @pytest.mark.parametrize("field", ["src", "uri", "cid", "val", "cts", "exp"])
    def test_a_string_field_refuses_every_other_type(self, field: str) -> None:
        for value in NO_STRINGS:
            error = refusal({**LEAST, field: value})
            assert error.field == field
            assert f"got {shown(value)}, expected" in str(error)

    @pytest.mark.parametrize(
        ("field", "form"),
        [
            ("src", "a DID"), ("uri", "a URI"), ("cid", "a CID"), ("val", "a value"),
            ("cts", "a datetime"), ("exp", "a datetime"),
        ],
    )  # fmt: skip
    def test_a_string_that_breaks_its_format_is_refused_with_what_was_expected(
        self, field: str, form: str
    ) -> None:
        _, _, bad = FORMATS[form]
        for text in bad:
            error = refusal({**LEAST, field: text})
            assert error.field == field, ascii(text)
            assert str(error).startswith(f"{field}: got ")
            assert ", expected " in str(error)

    def test_an_at_uri_and_every_uri_that_does_not_begin_as_one_may_be_labelled(self) -> None:
        others = [text for text in URIS if not text.startswith("at://")]
        for text in (*(text for text in AT_URIS if len(text) < 100), *others):
            check_subject(parse_label({**LEAST, "uri": text}))

    def test_a_uri_that_begins_as_an_at_uri_and_is_none_is_no_subject(self) -> None:
        for text in (text for text in NO_AT_URIS if text.startswith("at://")):
            label = parse_label(LEAST)._replace(uri=text)
            with pytest.raises(InvalidLabel) as refused:
                check_subject(label)
            assert refused.value.field == "uri"
            assert str(refused.value).startswith("uri: got ")
            assert "expected an AT-URI" in str(refused.value)

    @pytest.mark.parametrize("field", ["src", "uri", "cid", "val", "cts", "exp"])
    def test_an_unsafe_character_is_refused_by_its_code_point(self, field: str) -> None:
        text = WHOLE[field]
        for character in UNSAFE:
            error = refusal({**LEAST, field: text + character})
            assert error.field == field
            place = f"(U+{ord(character):04X}) at position {len(text)}, which is not allowed"
            assert place in str(error)

    @pytest.mark.parametrize("field", ["cid", "neg", "exp", "sig", "ver", "$type"])
    def test_null_for_an_optional_field_is_refused_with_the_advice_to_leave_it_out(
        self, field: str
    ) -> None:
        error = refusal({**WHOLE, field: None})
        assert error.field == field
        assert "got null" in str(error)
        assert str(error).endswith("or the field left out")

    @pytest.mark.parametrize("value", [0, 1, "true", "", [], {}], ids=brief)
    def test_a_negation_is_a_boolean_and_nothing_else(self, value: object) -> None:
        error = refusal({**LEAST, "neg": value})
        assert error.field == "neg"
        assert "expected true or false" in str(error)

    @pytest.mark.parametrize("value", [0, 2, -1, 1.0, True, "1", [1], 10**5000], ids=type)
    def test_a_version_is_the_integer_1_and_nothing_else(self, value: object) -> None:
        error = refusal({**LEAST, "ver": value})
        assert error.field == "ver"
        assert "expected the integer 1" in str(error)

    @pytest.mark.parametrize(
        "value", ["", "label", "com.atproto.label.defs", "com.atproto.label.defs#selfLabel", 1, []]
    )
    def test_a_type_is_that_of_a_label_and_nothing_else(self, value: object) -> None:
        error = refusal({**LEAST, "$type": value})
        assert error.field == "$type"
        assert "expected 'com.atproto.label.defs#label'" in str(error)

    @pytest.mark.parametrize("field", ["id", "seq", "signingKeyId", "Neg", "negated"])
    def test_an_unknown_field_is_named(self, field: str) -> None:
        error = refusal({**WHOLE, field: 1})
        assert error.field == field
        assert "is not a field of a label" in str(error)
        assert "$type, cid, cts, exp, neg, sig, src, uri, val, ver" in str(error)

    @pytest.mark.parametrize("field", ["", "x" * 100_000, "a\nb", "\ud800", "\u2028", 1], ids=brief)
    def test_an_unknown_field_is_named_in_a_short_printable_form(self, field: object) -> None:
        assert refusal({**LEAST, field: 1}).field == shown(field)

    def test_an_error_can_be_placed_in_its_request(self) -> None:
        error = refusal({**LEAST, "src": "bob"}).at(3)
        assert str(error).startswith("labels[3].src: got 'bob', expected a DID")


class TestSignatures:
    @pytest.mark.parametrize("size", [*range(1, 8), 64, 1023, 1024])
    def test_base64_is_accepted_with_and_without_padding(self, size: int) -> None:
        sig = bytes(range(256)) * 4
        padded = base64.b64encode(sig[:size]).decode()
        for text in (padded, padded.rstrip("=")):
            assert parse_label({**LEAST, "sig": {"$bytes": text}}).sig == sig[:size]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "=",
            "====",
            "A",
            "A===",
            "AAAAA",
            "AA=",
            "AAA==",
            "AAAA=",
            "AAAA==",
            "AA==AA==",
            "A=A=",
            "3q2-7w",
            "3q2_7w",
            # Bits that encoding would not set (RFC 4648, 3.5): they would come out as "3q2+7w".
            "3q2+7x",
            "AB==",
            "AAB",
            "3q2+ 7w",
            "3q2+7w\n",
            "3q2+\r\n7w",
            "é" * 4,
            "\ud800",
            base64.b64encode(bytes(1025)).decode(),
            "A" * 100_000,
            *NO_STRINGS,
        ],
        ids=brief,
    )
    def test_bytes_that_are_not_base64_of_1_to_1024_bytes_are_refused(self, text: object) -> None:
        error = refusal({**LEAST, "sig": {"$bytes": text}})
        assert error.field == "sig"
        assert "$bytes: got " in str(error)
        assert "base64 of 1 to 1024 bytes" in str(error)

    @pytest.mark.parametrize(
        "sig",
        [
            "3q2+7w",
            b"\xde\xad",
            [222, 173],
            {},
            {"bytes": "3q2+7w"},
            {"$bytes": "AA", "x": 1},
            True,
        ],
        ids=brief,
    )
    def test_a_signature_is_an_object_with_bytes_alone(self, sig: object) -> None:
        error = refusal({**LEAST, "sig": sig})
        assert error.field == "sig"
        assert '{"$bytes": base64 of 1 to 1024 bytes}' in str(error)


class TestWireForm:
    def test_absent_fields_are_left_out(self) -> None:
        assert label_json("did:a:b", "at://x", "", "spam", False, "now", None, None) == {
            "ver": 1,
            "src": "did:a:b",
            "uri": "at://x",
            "val": "spam",
            "cts": "now",
        }

    @pytest.mark.parametrize(("sig", "stated"), [(None, {}), (b"s", {"neg": False})])
    def test_a_negation_that_is_false_stands_where_a_signature_covers_it(
        self, sig: bytes | None, stated: dict[str, bool]
    ) -> None:
        wire = label_json("did:a:b", "at://x", "", "spam", False, "now", None, sig)
        assert {name: wire[name] for name in wire if name == "neg"} == stated

    def test_a_negation_that_is_null_in_the_row_is_left_out(self) -> None:
        assert "neg" not in label_json("did:a:b", "at://x", "", "spam", None, "now", None, None)

    def test_fields_stand_in_the_order_of_the_lexicon(self) -> None:
        wire = label_json(*parse_label(WHOLE))
        assert list(wire) == ["ver", "src", "uri", "cid", "val", "neg", "cts", "exp", "sig"]
        assert {"$type": LABEL_TYPE, **wire} == WHOLE

    @pytest.mark.parametrize("size", range(1, 7))
    def test_a_signature_has_no_padding_and_may_be_a_memoryview(self, size: int) -> None:
        sig = b"\xff\xfe\xfd\xfc\xfb\xfa"[:size]
        text = base64.b64encode(sig).decode().rstrip("=")
        for column in (sig, memoryview(sig)):
            wire = label_json("did:a:b", "at://x", "", "spam", False, "now", None, column)
            assert wire["sig"] == {"$bytes": text}

    @pytest.mark.parametrize("empty", [b"", memoryview(b"")], ids=type)
    def test_an_empty_signature_is_none(self, empty: bytes | memoryview) -> None:
        assert "sig" not in label_json("did:a:b", "at://x", "", "spam", False, "now", None, empty)

    @given(
        src=st.sampled_from([text for text in DIDS if len(text) < 300]),
        uri=st.sampled_from(AT_URIS) | st.from_regex(formats._URI, fullmatch=True).filter(is_uri),
        cid=st.just("") | st.sampled_from(CIDS),
        val=st.text(min_size=1, max_size=128).filter(is_val),
        neg=st.sampled_from([None, False, True]),
        cts=st.sampled_from(DATETIMES),
        exp=st.none() | st.sampled_from(DATETIMES),
        sig=st.none() | st.binary(min_size=1, max_size=100),
    )
    def test_a_label_survives_its_wire_form(
        self,
        src: str,
        uri: str,
        cid: str,
        val: str,
        neg: bool | None,
        cts: str,
        exp: str | None,
        sig: bytes | None,
    ) -> None:
        label = Label(src, uri, cid, val, neg, cts, exp, sig)
        wire = label_json(*label)
        if sig is None:
            label = label._replace(neg=neg or None)
        assert parse_label(wire) == label
        assert parse_label(json.loads(json.dumps(wire))) == label
        # No line splitter may find an end of line in the frame, not even Python's.
        encoded = ujson.dumps(wire, ensure_ascii=False, escape_forward_slashes=False)
        assert len(encoded.splitlines()) == 1
        assert parse_label(ujson.loads(encoded)) == label

    # What a decoder of JSON can hand on, and more: every text, every number.
    anything = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.sampled_from([5000, 4300, 20]).map(lambda digits: 10**digits)
        | st.floats()
        | st.text(st.characters(exclude_categories=())),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.text(max_size=8) | st.sampled_from(["$bytes", *WHOLE]), inner)
        ),
        max_leaves=4,
    )

    @settings(max_examples=150)
    @given(
        anything
        | st.dictionaries(
            st.sampled_from(sorted(WHOLE)) | st.text(st.characters(exclude_categories=())),
            anything,
            max_size=2,
        ).map(lambda changes: {**WHOLE, **changes})
    )
    def test_anything_is_parsed_or_refused_but_never_fails(self, given: Any) -> None:
        try:
            label = parse_label(given)
        except InvalidLabel as error:
            assert str(error).isprintable()
            assert len(str(error).encode()) < 500
        else:
            assert parse_label(label_json(*label)) == label


class TestWords:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, "null"),
            (True, "true"),
            (False, "false"),
            (0, "0"),
            (1.5, "1.5"),
            ("it's", '"it\'s"'),
            ("a\nb", r"'a\nb'"),
            ("x" * 60, "'" + "x" * 60 + "'"),
            ("x" * 61, "'" + "x" * 59 + "…' (61 characters)"),
            ("\u2028" * 60, "'" + r"\u2028" * 9 + r"\u202…' (60 characters)"),
            ([1, 2], "an array"),
            ({"a": 1}, "an object"),
            (10**5000, "a number beyond 64 bits"),
        ],
        ids=brief,
    )
    def test_a_value_is_shown_short_and_in_the_words_of_json(
        self, value: object, text: str
    ) -> None:
        assert shown(value) == text

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("fine, ünïcode, 😀", None),
            ("", None),
            ("a\rb", "has a control character (U+000D) at position 1, which is not allowed"),
            ("\u2029", "has a line separator (U+2029) at position 0, which is not allowed"),
            ("ab\udfff", "has a lone surrogate (U+DFFF) at position 2, which is not allowed"),
        ],
        ids=brief,
    )
    def test_the_first_unsafe_character_is_named(self, text: str, complaint: str | None) -> None:
        assert unsafe_in(text) == complaint

    def test_the_unsafe_characters_are_those_listed_here_and_no_others(self) -> None:
        everything = "".join(map(chr, range(0x110000)))
        unsafe = set(re.findall(formats._UNSAFE, everything))
        assert unsafe == set(UNSAFE) | set(map(chr, range(0xD800, 0xE000)))


class TestExpiry:
    @pytest.mark.parametrize(
        ("exp", "at"),
        [
            ("1970-01-01T00:00:00Z", 0.0),
            ("1970-01-01T00:00:01.5Z", 1.5),
            ("1970-01-01T00:00:01.123456789Z", 1.123456),
            ("1970-01-01T14:00:01+14:00", 1.0),
            ("1969-12-31T12:30:01.25-11:30", 1.25),
            ("0001-01-01T00:00:00+23:59", -62_135_683_140.0),
            ("9999-12-31T23:59:59.999999-00:01", 253_402_300_859.999999),
            # The year 0 is a leap year, 366 days before the year 1.
            ("0000-01-01T00:00:00Z", -62_135_596_800.0 - 366 * 86_400),
            ("0000-02-29T12:00:00+12:00", -62_135_596_800.0 - 307 * 86_400),
            ("0000-12-31T23:59:59Z", -62_135_596_801.0),
            # Without an offset, by other programs.
            ("1970-01-01T00:00:01", 1.0),
            ("1970-01-01 00:00:01.5", 1.5),
            ("1970-01-02", 86_400.0),
        ],
    )
    def test_every_form_of_a_datetime_is_a_time(self, exp: str, at: float) -> None:
        assert expires_at(exp) == at
        assert is_expired(exp, at)
        assert not is_expired(exp, at - 0.001)

    @pytest.mark.parametrize("exp", [None, "", "never", "2024-02-30T00:00:00Z", "2024", "\0"])
    def test_what_is_no_time_never_comes(self, exp: str | None) -> None:
        assert expires_at(exp) is None
        assert not is_expired(exp, 1e12)

    # The SQL that looks for what expires takes the first ten characters for the date.
    @pytest.mark.parametrize("exp", ["20240501T120000Z", "2024-W05-3", "20240501"])
    def test_a_date_that_the_table_cannot_be_searched_by_never_comes(self, exp: str) -> None:
        assert expires_at(exp) is None

    def test_a_time_without_an_offset_is_utc_whatever_the_zone_of_the_machine(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        try:
            for zone in ("Asia/Tokyo", "America/New_York", "UTC"):
                monkeypatch.setenv("TZ", zone)
                time.tzset()
                assert expires_at("2024-05-01T12:00:00") == expires_at("2024-05-01T12:00:00Z")
        finally:
            monkeypatch.undo()
            time.tzset()

    @given(
        st.from_regex(
            r"(0000|0001|9999|2024|[0-9]{4})-([01][0-9]-[0-3][0-9]|12-31|02-29|01-01)"
            r"T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,20})?(Z|[+-][0-2][0-9]:[0-5][0-9])",
            fullmatch=True,
        )
    )
    def test_every_datetime_that_is_accepted_is_a_time(self, text: str) -> None:
        if is_datetime(text):
            assert expires_at(text) is not None
