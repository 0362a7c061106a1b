"""Where pip would look for packages: the recipe downloads its sources from the same places.

A build environment has no pip to ask (uv's never has), so its settings are read here: environment
variables first, then the configuration files in pip's order. Options on pip's command line do not
reach a build backend.
"""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host", "no-index", "cert")
SECTIONS = ("global", "install")  # later ones win, as in pip
TRUE = {"1", "true", "yes", "on", "y", "t"}


@dataclass(frozen=True)
class IndexSettings:
    """Places to look in. No index and no link at all means the default index."""

    index_urls: list[str] = field(default_factory=list)
    find_links: list[str] = field(default_factory=list)
    trusted_hosts: list[str] = field(default_factory=list)
    certificate: str | None = None

    @classmethod
    def from_pip(
        cls,
        environ: Mapping[str, str] | None = None,
        config_files: Sequence[Path] | None = None,
    ) -> IndexSettings:
        """Read pip's settings and uv's index variables. Of `config_files`, the later one wins."""
        environ = os.environ if environ is None else environ
        if config_files is None:
            config_files = pip_config_files(environ)
        settings = _read_files(config_files)
        for key in KEYS:
            value = environ.get("PIP_" + key.upper().replace("-", "_"))
            if value:
                settings[key] = value
        uv_main = environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL")
        uv_extra = environ.get("UV_INDEX") or environ.get("UV_EXTRA_INDEX_URL")
        main = uv_main or settings.get("index-url")
        extra = _words(uv_extra or settings.get("extra-index-url"))
        links = _words(settings.get("find-links"))
        if settings.get("no-index", "").lower() in TRUE:
            urls: list[str] = []
        else:
            # unearth's default index is only used where no other place is named.
            urls = [_without_name(url) for url in ([main] if main else [default_index()]) + extra]
        return cls(urls, links, _words(settings.get("trusted-host")), settings.get("cert"))

    def export_certificates(self) -> None:
        """Let the download trust the certificates that pip trusts."""
        if self.certificate:
            os.environ.setdefault("SSL_CERT_FILE", self.certificate)

    def __str__(self) -> str:
        # A URL may carry a password, which must not end up in a log.
        shown = [_without_password(place) for place in self.index_urls + self.find_links]
        return ", ".join(shown) or "no place at all (PIP_NO_INDEX without PIP_FIND_LINKS)"


def default_index() -> str:
    """The index that unearth uses when told nothing."""
    from unearth import PackageFinder

    return PackageFinder().sources[0]["url"]


def pip_config_files(environ: Mapping[str, str]) -> list[Path]:
    """pip's configuration files for Linux and macOS, least important first."""
    named = environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    home = Path(environ.get("HOME") or Path.home())
    config_home = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    config_dirs = (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    files = [Path(folder) / "pip" / "pip.conf" for folder in config_dirs]
    files += [Path("/etc/pip.conf"), home / ".pip" / "pip.conf"]
    if sys.platform == "darwin":
        files.append(home / "Library" / "Application Support" / "pip" / "pip.conf")
    files += [config_home / "pip" / "pip.conf", Path(sys.prefix) / "pip.conf"]
    return files + ([Path(named)] if named else [])


def _read_files(files: Sequence[Path]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (OSError, UnicodeDecodeError, configparser.Error):
            continue  # pip itself reports a broken file
        for section in SECTIONS:
            if parser.has_section(section):
                settings.update({k.replace("_", "-"): v for k, v in parser.items(section)})
    return settings


def _words(text: str | None) -> list[str]:
    return (text or "").split()


def _without_name(url: str) -> str:
    """uv allows `name=https://...` for an index."""
    name, equals, rest = url.partition("=")
    return rest if equals and "://" in rest and "://" not in name else url


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("/")
    return scheme + separator + host.rpartition("@")[2] + slash + path
