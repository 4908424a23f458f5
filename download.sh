#!/bin/sh
#
# Downloads Llama weights through the signed URL of the e-mail that Meta sends:
#
#     ./download.sh                                    asks for the URL, then for the models
#     PRESIGNED_URL='https://...' ./download.sh 8B-instruct
#     ./download.sh --help
#
# Needs python3 and nothing else: llama/commands/download.py does it, with the standard library alone.

case $0 in
*/*) file=$0 ;;
*) file=./$0 ;; # sh download.sh
esac
while [ -L "$file" ]; do # macOS has no readlink -f
    link=$(readlink "$file")
    case $link in
    /*) file=$link ;;
    *) file=${file%/*}/$link ;;
    esac
done
if ! python3 -c 'import sys, ssl; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
    echo "download.sh: this needs python3, of version 3.9 or later and with SSL, and here is" \
        "$(python3 --version 2>/dev/null || echo none): install it from https://www.python.org" >&2
    exit 1
fi
exec python3 "${file%/*}/llama/commands/download.py" "$@"
