"""python -m bench.peers install vllm llama.cpp transformers | python -m bench.peers list"""

from __future__ import annotations

import argparse
import sys

from bench.peers.install import InstallError, install
from bench.peers.places import PEERS, place_of


def main() -> None:
    """Install peers, or say which are there."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers")
    commands = parser.add_subparsers(dest="command", required=True)
    installer = commands.add_parser("install", help="install peers into the user's cache directory")
    installer.add_argument("peers", nargs="+", choices=PEERS)
    commands.add_parser("list", help="say which peers are installed, and where")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for peer in PEERS:
            place = place_of(peer)
            print(f"{peer}: {place.installed() or 'not installed'} ({place.root})")
        return
    try:
        for peer in arguments.peers:
            install(peer)
    except InstallError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
