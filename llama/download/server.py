"""Asking for a file through a signed URL: what a server answers, by Python's own library alone.

Knows HTTP, proxies and certificates, on Python 3.9 as well; refuses to know what is done with the
answer. The URL is a secret, so no sentence here shows what stands after its question mark.
"""

from __future__ import annotations

import http.client
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Literal

from llama.download.url import SignedUrl

_BLOCK = 2**18  # bytes taken from the connection at one time
_PAGE_TYPE = re.compile(r"text/html|/xml|\+xml", re.I)
_SYSTEM_CERTIFICATES = Path("/etc/ssl/cert.pem")  # of macOS, also where its Python knows none
Kind = Literal["file", "absent", "refused", "unwritten", "all"]


class Failed(Exception):
    """A file was not to be had, in a sentence. `kind` says what else will fare no better.

    "file": nothing else; "absent": the model's other files; the others: nothing is worth a try, as
    the URL was refused, the disk does not take it, or something stands between.
    """

    def __init__(self, sentence: str, kind: Kind = "file") -> None:
        super().__init__(sentence)
        self.kind = kind


@dataclass
class Answer:
    """What a server answered to one request."""

    status: int | None = None  # None: there was no answer
    total: int | None = None  # bytes of the whole file, where the server says so
    verdict: str = ""  # of a 200 or 206: "body", a "page" of the web, or to be begun "anew"
    complete: bool = False  # the body ended where HTTP says that it ends
    trouble: str = ""
    response: http.client.HTTPResponse | None = None

    def read_head(self, status: int, headers: Message, start: int) -> None:
        """The first lines of an answer to a request for the bytes from `start` on."""
        self.status, first = status, 0
        if status == 200:
            self.total = _number(headers.get("Content-Length", ""))
        if span := headers.get("Content-Range"):
            self.total = _number(span.rpartition("/")[2])
            found = re.match(r"bytes (\d+)-", span.strip(), re.I)
            first = int(found[1]) if found else -1
        if status not in (200, 206):
            return
        if _PAGE_TYPE.search(headers.get("Content-Type", "")):
            self.verdict = "page"
        elif first != start or (status == 200 and start > 0):
            self.verdict = "anew"  # the range was ignored
        else:
            self.verdict = "body"

    def body(self) -> Iterator[bytes]:
        """The bytes that follow, as they come; then `complete` and `trouble` say how that ended."""
        assert self.response is not None, self.status
        left = self.response.length  # None: until the connection ends, or in chunks
        with self.response as response:
            while left is None or left > 0:
                try:
                    block = response.read1(_BLOCK if left is None else min(_BLOCK, left))
                except (OSError, http.client.HTTPException) as error:
                    self.trouble = _words(error)
                    return
                if not block:
                    break
                yield block
                left = None if left is None else left - len(block)
        self.complete = not left


class Server:
    """Where the files come from: the signed URL, through the proxies that the system names.

    `timeout` is in seconds: how long a connection may be silent.
    """

    def __init__(self, url: SignedUrl, timeout: int) -> None:
        self.url, self.timeout = url, timeout
        scheme = url.before.partition(":")[0]
        proxies = _proxies(scheme)
        bypassed = urllib.request.proxy_bypass(url.host)
        self.proxy = f"{scheme}_proxy" if scheme in proxies and not bypassed else None
        context = ssl.create_default_context()
        if not context.cert_store_stats()["x509_ca"] and _SYSTEM_CERTIFICATES.is_file():
            context.load_verify_locations(_SYSTEM_CERTIFICATES)
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context)
        )

    def ask(self, path: str, start: int) -> Answer:
        """Request a file from byte `start` on; Failed where no request can do better."""
        headers = {"User-Agent": "llama-download"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(self.url.to(path), headers=headers)
        answer = Answer()
        try:
            response = self._opener.open(request, timeout=self.timeout)
            answer.read_head(response.status, response.headers, start)
            if answer.verdict == "body":
                answer.response = response
            else:
                response.close()
        except urllib.error.HTTPError as error:
            answer.read_head(error.code, error.headers, start)
            error.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise Failed(self._distrust(reason), "all") from error
            answer.trouble = _words(reason if isinstance(reason, OSError) else error)
        if answer.status == 407 or "Tunnel connection failed: 407" in answer.trouble:
            raise Failed(
                f"the proxy of {self.proxy} wants a name and a password: write them into it, as in "
                "http://NAME:PASSWORD@HOST:PORT",
                "all",
            )
        return answer

    def _distrust(self, error: ssl.SSLCertVerificationError) -> str:
        return (
            f"the certificate of {self.url.host} is not trusted ({error.verify_message}): on "
            "macOS, run 'Install Certificates.command' in the folder of Python in Applications; "
            "elsewhere, install your system's ca-certificates, or name a file of certificates, "
            "your proxy's among them if it has one, in SSL_CERT_FILE"
        )


def _proxies(scheme: str) -> dict[str, str]:
    """The proxies of the environment, or of the system; Failed for one of another sort."""
    proxies = urllib.request.getproxies()
    for_all = proxies.pop("all", None)
    if for_all is not None:
        proxies = {"http": for_all, "https": for_all, **proxies}
    if proxies.get(scheme, "").lower().startswith("socks"):
        raise Failed(
            f"{scheme}_proxy or all_proxy names a SOCKS proxy, through which Python's own library "
            "cannot go: name an HTTP proxy there, or unset it",
            "all",
        )
    return proxies


def _words(error: Exception) -> str:
    """What an error of a connection says, without the URL."""
    if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
        return "the answer was not HTTP, or was cut off"
    text = getattr(error, "strerror", None) or str(error)
    return "".join(c for c in re.sub(r"\?\S*", "", text) if c.isprintable())


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else None
