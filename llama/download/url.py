"""The signed URL of Meta's e-mail: put right where copying altered it, and read for its date.

Knows text alone, on Python 3.9 and with the standard library; refuses to know what is fetched
through it. The URL is a secret: no message here shows what stands after its question mark.
"""

from __future__ import annotations

import base64
import re
import time
import urllib.parse
from typing import NamedTuple

ASK_FOR_URL = "https://www.llama.com/llama-downloads/"
_AGAIN = "copy it anew from the e-mail, in single quotes if it stands on a command line"


class SignedUrl(NamedTuple):
    """What stands before and after the path of a file, for which the URL has a `*`."""

    before: str
    after: str

    @property
    def host(self) -> str:
        return self.before.partition("://")[2].partition("/")[0]

    def to(self, path: str) -> str:
        """The signed URL of the file that lies at `path` on the server."""
        return f"{self.before}{path}{self.after}"

    def expiry(self) -> str:
        """What the URL itself says about its time; empty where that cannot be read."""
        policy = self.after.partition("Policy=")[2].partition("&")[0]
        coded = policy.translate(str.maketrans("-_~", "+=/"))
        try:
            text = base64.b64decode(coded + "==").decode(errors="replace")
        except ValueError:
            return ""
        found = re.search(r'EpochTime"* *: *([0-9]{9,11})', text)
        if found is None:
            return ""
        left = int(found[1]) - int(time.time())
        if left < 0:
            return f" By the date in it, it expired {-left // 3600} hours ago."
        hours = left // 3600
        return f" By the date in it, it is good for {hours} more hours, so it is one of the others."


def read_url(given: str) -> SignedUrl:
    """The URL, put right; ValueError with the reason where it cannot be."""
    url = clean_url(given)
    problem = url_problem(url)
    if problem:
        raise ValueError(problem)
    before, _, after = url.partition("*")
    return SignedUrl(before, after)


def clean_url(text: str) -> str:
    """The URL in a text that mail programs and shells have put quotes, breaks and escapes into.

    A URL has printable ASCII only, and none of the quotes, angle brackets and backslashes; so what
    is not of a URL can go, whatever stands around it.
    """
    if "Policy=3D" in text:  # the source of an e-mail: quoted-printable, lines end in =
        lines = text.replace("\r", "").split("\n")
        text = "".join(line[:-1] if line.endswith("=") else line for line in lines)
        text = text.replace("=3D", "=")
    text = _url_characters(text)
    while "&amp;" in text:
        text = text.replace("&amp;", "&")
    text = re.sub(r"^.*(https?://)", r"\1", text)
    text = re.sub(r"[\].,;)]*$", "", text)
    if re.search(r"[?&]url=http.*%3A%2F%2F", text, re.I):  # a mail filter's link around the real
        text = re.sub(r"^.*[?&]url=", "", text)
        text = _url_characters(urllib.parse.unquote(text.partition("&")[0]))
    if re.search(r"%3[Ff]Policy%3[Dd]", text):
        text = re.sub(r"%3[Ff]", "?", text, count=1)
        text = re.sub(r"%3[Dd]", "=", text).replace("%26", "&")
    text = re.sub(r"%2[Aa]\?", "*?", text, count=1)
    return re.sub(r"^(https?://[^/?*]*)/?\?", r"\1/*?", text)


def _url_characters(text: str) -> str:
    return "".join(c for c in text if "!" <= c <= "~" and c not in "\"'<>\\`")


def url_problem(url: str) -> str:
    """What is wrong with a cleaned URL, in a sentence; empty where nothing is."""
    if not url:
        return (
            f"no URL was given: set PRESIGNED_URL or enter the URL of the e-mail from {ASK_FOR_URL}"
        )
    if re.fullmatch(r"https?://", url):  # what is left of an example
        return f"the URL ends after '{url}': {_AGAIN}"
    if not re.match(r"https?://.", url):
        return f"'{url[:60]}' is not a URL that begins with https://: {_AGAIN}"
    if url.count("*") > 1:
        return f"the URL has more than one '*', where a file's path goes: {_AGAIN}"
    if "?" not in url:
        return (
            f"the URL has no '?Policy=...&Signature=...' after its path: it was cut off; {_AGAIN}"
        )
    if "*" not in url:
        return f"the URL has no '*', where a file's path goes: {_AGAIN}"
    if re.search(r"[?&]Policy=", url) and re.search(r"[?&]Signature=", url):
        return ""
    if "Policy=" in url:
        return f"the URL has no 'Signature=': it was cut off at the first '&'; {_AGAIN}"
    return f"the URL has no 'Policy=' and 'Signature=': {_AGAIN}"
