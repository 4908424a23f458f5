#!/usr/bin/env bash
#
# Downloads Llama weights through the signed URL of the e-mail that Meta sends:
#
#     ./download.sh                                    asks for the URL, then for the models
#     PRESIGNED_URL='https://...' ./download.sh 8B-instruct
#     ./download.sh --help
#
# A file gets its own name only when it is whole and matches the model's checklist.chk; until then it is
# NAME.part, and the same command goes on where it stopped. Needs curl or wget, and md5sum, md5 or openssl.
# Written for bash 3.2, which macOS ships: no associative arrays, no wait -n, no ${x,,}.

set -u
export LC_ALL=C # bytes are bytes, and the messages of tools are the ones looked for below
unset CDPATH

ASK_FOR_URL=https://www.llama.com/llama-downloads/

# name | also called | path on the server, (Meta-) where it came to be left out | folder here, = for the same |
# shards | MB on disk | tokenizer beside the weights or at the root | name of the policy | has a checklist
models() {
    awk '{
        older = newer = $3; gsub(/[()]/, "", older); sub(/\(Meta-\)/, "", newer)
        $3 = older == newer ? older : older "," newer
        if ($4 == "=") $4 = older
        print
    }' <<'TABLE'
llama-2-7b                   7b           llama-2-7b                          =                         1  13477  root   USE_POLICY.md yes
llama-2-7b-chat              7b-chat      llama-2-7b-chat                     =                         1  13477  root   USE_POLICY.md yes
llama-2-13b                  13b          llama-2-13b                         =                         2  26032  root   USE_POLICY.md yes
llama-2-13b-chat             13b-chat     llama-2-13b-chat                    =                         2  26032  root   USE_POLICY.md yes
llama-2-70b                  -            llama-2-70b                         =                         8  137954 root   USE_POLICY.md yes
llama-2-70b-chat             70b-chat     llama-2-70b-chat                    =                         8  137954 root   USE_POLICY.md yes
llama-3-8b                   8b           8b_pre_trained                      Meta-Llama-3-8B           1  16061  beside USE_POLICY    yes
llama-3-8b-instruct          8b-instruct  8b_instruction_tuned                Meta-Llama-3-8B-Instruct  1  16061  beside USE_POLICY    yes
llama-3-70b                  70b          70b_pre_trained                     Meta-Llama-3-70B          8  141108 beside USE_POLICY    yes
llama-3-70b-instruct         70b-instruct 70b_instruction_tuned               Meta-Llama-3-70B-Instruct 8  141108 beside USE_POLICY    yes
llama-3.1-8b                 -            (Meta-)Llama-3.1-8B                 =                         1  16061  beside USE_POLICY.md maybe
llama-3.1-8b-instruct        -            (Meta-)Llama-3.1-8B-Instruct        =                         1  16061  beside USE_POLICY.md maybe
llama-3.1-70b                -            (Meta-)Llama-3.1-70B                =                         8  141108 beside USE_POLICY.md maybe
llama-3.1-70b-instruct       -            (Meta-)Llama-3.1-70B-Instruct       =                         8  141108 beside USE_POLICY.md maybe
llama-3.1-405b-mp8           -            (Meta-)Llama-3.1-405B-MP8           =                         8  811768 beside USE_POLICY.md maybe
llama-3.1-405b-mp16          -            (Meta-)Llama-3.1-405B-MP16          =                         16 820293 beside USE_POLICY.md maybe
llama-3.1-405b-instruct-mp8  -            (Meta-)Llama-3.1-405B-Instruct-MP8  =                         8  811768 beside USE_POLICY.md maybe
llama-3.1-405b-instruct-mp16 -            (Meta-)Llama-3.1-405B-Instruct-MP16 =                         16 820293 beside USE_POLICY.md maybe
llama-3.2-1b                 1b           Llama-3.2-1B                        =                         1  2472   beside USE_POLICY.md yes
llama-3.2-1b-instruct        1b-instruct  Llama-3.2-1B-Instruct               =                         1  2472   beside USE_POLICY.md yes
llama-3.2-3b                 3b           Llama-3.2-3B                        =                         1  6426   beside USE_POLICY.md yes
llama-3.2-3b-instruct        3b-instruct  Llama-3.2-3B-Instruct               =                         1  6426   beside USE_POLICY.md yes
llama-3.3-70b-instruct       -            Llama-3.3-70B-Instruct              =                         8  141108 beside USE_POLICY.md yes
llama-guard-7b               guard        .                                   llama-guard               1  13477  beside USE_POLICY.md maybe
llama-guard-2-8b             guard-2      llama-guard-2                       Meta-Llama-Guard-2-8B     1  16061  beside USE_POLICY.md maybe
llama-guard-3-8b             guard-3      (Meta-)Llama-Guard-3-8B             =                         1  16061  beside USE_POLICY.md maybe
llama-guard-3-1b             -            Llama-Guard-3-1B                    =                         1  2998   beside USE_POLICY.md maybe
TABLE
}

usage() {
    cat <<EOF
Usage: download.sh [options] [model ...]

Downloads Llama weights through the signed URL that Meta sends by e-mail ($ASK_FOR_URL).
The URL is read from PRESIGNED_URL, or asked for. Without a model the list is shown and the choice asked for.

A model is a name of --list in upper or lower case (8B-instruct, llama-3.1-70b, Meta-Llama-3-8B), a family
(llama-3.2) or all; several are separated by commas or spaces.

  --list           the models: names, size on disk, shards, folder
  --dry-run        say what would be downloaded, and do nothing
  --target DIR     where the models' folders go (default: here)
  --jobs N         download N files at a time (default 1)
  --timeout S      give up on a connection after S silent seconds (default 30), then try again
  --retries N      tries without any progress before a file is given up (default 5)
  --no-space-check do not compare the size of the models with the free space first
  --help           this text

Exit status: 0 everything is there and whole, 1 something is not, 2 wrong usage, 130 interrupted.
EOF
}

# ---------------------------------------------------------------------------------------------- messages

say() { printf '%s%s\n' "$CLEAR" "$*"; }
complain() { printf '%sdownload.sh: %s\n' "$CLEAR" "$*" >&2; }
die() { # message, status
    complain "$1"
    exit "${2:-1}"
}

human() { # bytes, for people
    local n="$1" unit=MB step=1000000
    if [ "$n" -lt 10000 ]; then
        echo "$n bytes"
        return
    elif [ "$n" -lt 1000000 ]; then
        unit=kB step=1000
    elif [ "$n" -ge 1000000000000 ]; then
        unit=TB step=1000000000000
    elif [ "$n" -ge 1000000000 ]; then
        unit=GB step=1000000000
    fi
    n=$(((n * 10 + step / 2) / step)) # tenths
    echo "$((n / 10)).$((n % 10)) $unit"
}

size_of() { # bytes of a file, 0 where there is none
    if [ -f "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi
}

# ------------------------------------------------------------------------------------------------ models

list() {
    printf '%-29s %-13s %9s %7s  %s\n' NAME 'OR SHORT' SIZE SHARDS FOLDER
    models | while read -r name short _ folder shards mb _; do
        printf '%-29s %-13s %9s %7s  %s\n' "$name" "$short" "$(human $((mb * 1000000)))" "$shards" "$folder"
    done
}

matching() { # the names of the models that one word of the user means
    models | awk -v word="$1" '
        BEGIN { word = tolower(word); sub(/^meta-llama\//, "", word); sub(/^meta-/, "", word) }
        {
            folder = tolower($4); sub(/^meta-/, "", folder)
            number = substr($1, 7) # the name without llama-
            family = $1; sub(/-[^-]*$/, "", family) # what stands before the size
            while (family ~ /-.*-/) sub(/-[^-]*$/, "", family)
        }
        word == "all" || word == $1 || word == folder || word == number || word == family { print $1; next }
        word == $2 && word != "-" { print $1 }'
}

names_models() ( # whether all the words of a line are models; true of no words too
    set -f
    for word in $(printf '%s' "$1" | tr ',' ' '); do
        [ -n "$(matching "$word")" ] || exit 1
    done
)

choose() { # the words of the user -> CHOSEN, names separated by spaces, each once
    local word name found
    CHOSEN=
    set -f
    for word in $(printf '%s' "$*" | tr ',' ' '); do
        found=$(matching "$word")
        if [ -z "$found" ]; then
            list >&2
            die "there is no model '$word': take one of the list above, a family (llama-3.1) or all" 2
        fi
        for name in $found; do
            case " $CHOSEN " in *" $name "*) ;; *) CHOSEN="$CHOSEN $name" ;; esac
        done
    done
    set +f
    CHOSEN=${CHOSEN# }
}

describe() { # a name -> the columns of its line
    read -r _ _ PATHS FOLDER_NAME SHARDS MB TOKENIZER POLICY CHECKLIST \
        <<<"$(models | awk -v name="$1" '$1 == name')"
    FOLDER="$TARGET/$FOLDER_NAME"
}

files_of_model() { # need (must or may), path on the server, name here; $1: where the model is on the server
    local at="$1/" shard=0 tokenizer_at
    [ "$1" = . ] && at=
    tokenizer_at=$at
    [ "$TOKENIZER" = root ] && tokenizer_at=
    echo "must ${at}params.json params.json"
    echo "must ${tokenizer_at}tokenizer.model tokenizer.model"
    echo "may LICENSE LICENSE"
    echo "may $POLICY $POLICY"
    while [ "$shard" -lt "$SHARDS" ]; do
        printf 'must %sconsolidated.%02d.pth consolidated.%02d.pth\n' "$at" "$shard" "$shard"
        shard=$((shard + 1))
    done
}

# --------------------------------------------------------------------------------------------------- URL

# A URL has printable ASCII only, and none of the quotes, angle brackets and backslashes that mail programs
# and shells put around and into it; so what is not of a URL can go wherever it stands.
clean_url() {
    local url="$1"
    case "$url" in
    *Policy=3D*) # the source of an e-mail: quoted-printable, lines end in =
        url=$(printf '%s' "$url" | tr -d '\r' | sed -e 's/=$//' | tr -d '\n' | sed -e 's/=3D/=/g')
        ;;
    esac
    url=$(printf '%s' "$url" | tr -cd '!-~' | tr -d '"'\''<>\\`' | sed \
        -e ':again' -e 's/&amp;/\&/g' -e 't again' \
        -e 's/^.*\(https\{0,1\}:\/\/\)/\1/' -e 's/[].,;)]*$//')
    case "$url" in
    *[?\&]url=http*%3[Aa]%2[Ff]%2[Ff]*) # a mail filter's link around the real one
        url=$(printf '%s' "$url" | sed -e 's/^.*[?&]url=//' -e 's/&.*$//')
        url=$(printf '%b' "${url//%/\\x}")
        ;;
    esac
    printf '%s' "$url" | sed -e '/%3[Ff]Policy%3[Dd]/{' \
        -e 's/%3[Ff]/?/' -e 's/%3[Dd]/=/g' -e 's/%26/\&/g' -e '}' \
        -e 's/%2[Aa]?/*?/' -e 's/^\(https\{0,1\}:\/\/[^/?*]*\)\/\{0,1\}?/\1\/*?/'
}

url_problem() { # what is wrong with a cleaned URL; nothing where nothing is
    local again="copy it anew from the e-mail, in single quotes if it stands on a command line"
    case "$1" in
    '') echo "no URL was given: set PRESIGNED_URL or enter the URL of the e-mail from $ASK_FOR_URL" ;;
    http://?* | https://?*)
        case "$1" in
        *\**\**) echo "the URL has more than one '*', where a file's path goes: $again" ;;
        *\?*)
            case "$1" in
            *\**) ;;
            *) echo "the URL has no '*', where a file's path goes: $again" ;;
            esac
            case "$1" in
            *[?\&]Policy=*[?\&]Signature=* | *[?\&]Signature=*[?\&]Policy=*) ;;
            *Policy=*) echo "the URL has no 'Signature=': it was cut off at the first '&'; $again" ;;
            *) echo "the URL has no 'Policy=' and 'Signature=': $again" ;;
            esac
            ;;
        *) echo "the URL has no '?Policy=...&Signature=...' after its path: it was cut off; $again" ;;
        esac
        ;;
    *) echo "'$(printf '%.60s' "$1")' is not a URL that begins with https://: $again" ;;
    esac | head -n 1
}

take_url() { # PRESIGNED_URL as given -> BEFORE and AFTER, what stands before and after a file's path
    local given="$1" url problem
    url=$(clean_url "$given")
    problem=$(url_problem "$url")
    [ -z "$problem" ] || die "$problem" 2
    [ "$url" = "$given" ] ||
        say "The URL was altered in copying (white space, quotes, &amp; or a lost *) and has been put right."
    case "$url" in
    *Key-Pair-Id=*) ;;
    *) complain "the URL has no 'Key-Pair-Id=': it may have been cut off at its end; trying it as it is" ;;
    esac
    BEFORE=${url%%\**}
    AFTER=${url#*\*}
    HOST=${BEFORE#*://}
    HOST=${HOST%%/*}
}

ask_url() { # a URL that was wrapped comes as several lines: those that follow at once and name no model
    local line
    printf 'Enter the URL from email: ' >&2
    URL=
    IFS= read -r URL || [ -n "$URL" ] || die "$(url_problem '')" 2
    while IFS= read -r -t 1 line; do
        if [ -t 0 ] && [ -z "$line" ]; then
            continue # the end of a pasted paragraph, not an answer
        elif names_models "$line"; then
            ANSWER=$line
            ANSWERED=yes
            break
        fi
        URL="$URL
$line"
    done
}

ask_models() {
    local sum=0 name line=
    list
    printf '\nModels, separated by commas (8B,8B-instruct), a family (llama-3.1), or Enter for all: ' >&2
    if [ "$ANSWERED" = no ]; then
        IFS= read -r ANSWER || [ -n "$ANSWER" ] ||
            die "no model was chosen: name it, as in ./download.sh 8B-instruct" 2
    fi
    choose "$ANSWER"
    [ -z "$CHOSEN" ] || return 0
    choose all
    for name in $CHOSEN; do
        describe "$name"
        sum=$((sum + MB))
    done
    printf 'All models of all families are about %s. Type yes to go on: ' "$(human $((sum * 1000000)))" >&2
    IFS= read -r line
    case "$line" in
    [Yy][Ee][Ss]) ;;
    *) die "nothing was downloaded: name the models, as in ./download.sh 8B-instruct" 2 ;;
    esac
}

expiry() { # what the URL says itself about its time; nothing where that cannot be read
    local policy until now
    policy=${AFTER#*Policy=}
    policy=$(printf '%s' "${policy%%&*}" | tr -- '-_~' '+=/')
    until=$(printf '%s' "$policy" | { base64 -d || base64 -D; } 2>/dev/null |
        sed -n 's/.*EpochTime"* *: *\([0-9]\{9,11\}\).*/\1/p')
    [ -n "$until" ] || return 0
    now=$(date +%s)
    if [ "$now" -gt "$until" ]; then
        echo " By the date in it, it expired $(((now - until) / 3600)) hours ago."
    else
        echo " By the date in it, it is good for $(((until - now) / 3600)) more hours, so it is one of the others."
    fi
}

refusal() { # what a 403 of file $1 means
    echo "$HOST refused $1 (403): the URL has expired (it lasts 24 hours), its download quota is used up, it was" \
        "mangled in copying, or it is not for $FOLDER_NAME.$(expiry) Ask for a new one at $ASK_FOR_URL and run the" \
        "same command with it: what is whole stays, and .part files are resumed."
}

# --------------------------------------------------------------------------------------------- checksums

find_tools() {
    if command -v curl >/dev/null; then
        TOOL=curl
    elif command -v wget >/dev/null; then
        TOOL=wget
    else
        die "neither curl nor wget is installed, and one of them is needed"
    fi
    # wget learned to go on in the middle of a stream in 1.16; before, a file starts anew
    if [ "$TOOL" = wget ] && ! wget --help 2>/dev/null | grep -q -e --start-pos; then CAN_RESUME=no; fi
    if ! command -v md5sum >/dev/null && ! command -v md5 >/dev/null && ! command -v openssl >/dev/null; then
        die "none of md5sum, md5 and openssl is installed, and one is needed to compare checksums"
    fi
}

digest() { # of file $2, by MD5 or SHA-256 as the length of $1 says, in lower case
    case "${#1}" in
    32)
        if command -v md5sum >/dev/null; then
            md5sum <"$2"
        elif command -v md5 >/dev/null; then
            md5 -q <"$2"
        else
            openssl dgst -md5 -r <"$2"
        fi
        ;;
    64)
        if command -v sha256sum >/dev/null; then
            sha256sum <"$2"
        elif command -v shasum >/dev/null; then
            shasum -a 256 <"$2"
        else
            openssl dgst -sha256 -r <"$2"
        fi
        ;;
    esac | awk '{ print tolower($1); exit }'
}

listed() { # the digest that the model's checklists give for file $1; nothing where none does
    local chk
    for chk in "$FOLDER/checklist.chk" "$FOLDER/tokenizer_checklist.chk"; do
        [ -f "$chk" ] && cat "$chk"
    done | awk -v name="$1" '
        { sub(/\r$/, ""); digest = tolower($1); sub(/^[ \t]*[^ \t]+[ \t]+\*?/, ""); sub(/.*\//, "") }
        $0 == name { print digest; exit }'
}

is_checklist() {
    [ -f "$1" ] && awk '
        { sub(/\r$/, "") }
        NF == 0 { next }
        $1 ~ /[^0-9a-fA-F]/ || (length($1) != 32 && length($1) != 64) || NF < 2 { bad = 1 }
        { lines++ }
        END { exit bad || !lines }' "$1"
}

is_page() { # HTML or XML where a file should be; no weight, JSON or text of these begins with such a tag
    case "$(head -c 512 "$1" | tr -d '\000 \t\r\n' | tr '[:upper:]' '[:lower:]')" in
    '<!doctype'* | '<html'* | '<head'* | '<?xml'* | '<error'*) return 0 ;;
    esac
    return 1
}

matches() { # whether file $1 has the digest $2; the sum runs beside, so that a signal can end it
    digest "$2" "$1" >"$STATE/digest.$ID" &
    CHILDREN=$!
    wait "$CHILDREN"
    DIGEST=$(cat "$STATE/digest.$ID")
    [ "$DIGEST" = "$2" ]
}

# ---------------------------------------------------------------------------------------------- transfer

header_line() { # one line of an answer's head; a new status line forgets the answers before (redirects)
    local line="${1%$'\r'}"
    case "$line" in
    '  '*) line=${line#  } ;; # as wget logs it
    esac
    case "$line" in
    HTTP/*)
        status=${line#* }
        status=${status%% *}
        total=- from=0 page=no tunnel=no location=no
        case "$line" in *[Cc]onnection\ [Ee]stablished*) tunnel=yes ;; esac
        ;;
    [Cc]ontent-[Ll]ength:*) [ "$status" != 200 ] || total=$(number "${line#*:}") ;;
    [Cc]ontent-[Rr]ange:*)
        total=$(number "${line##*/}")
        line=${line#*[Bb]ytes }
        from=$(number "${line%%-*}")
        ;;
    [Cc]ontent-[Tt]ype:*text/html* | [Cc]ontent-[Tt]ype:*/xml* | [Cc]ontent-[Tt]ype:*+xml*) page=yes ;;
    [Ll]ocation:*) location=yes ;;
    esac
}

number() { # digits as they are, - for anything else
    local digits="${1// /}"
    case "$digits" in
    '' | *[!0-9]*) echo - ;;
    *) echo "$digits" ;;
    esac
}

# Reads what the tool sends and appends it to file $1 of $2 bytes if, and only if, the head of the answer says
# that it continues just there. curl sends the head with the body; wget logs it before the first byte.
receive() {
    local line status=- total=- from=0 page=no tunnel=no location=no verdict=none
    : >"$STATE/first.$ID"
    if [ "$TOOL" = curl ]; then
        while IFS= read -r line; do
            if [ "$line" != $'\r' ] && [ -n "$line" ]; then
                header_line "$line"
                continue
            fi
            case "$status-$location-$tunnel" in
            1??-* | 3??-yes-* | *-yes) ;; # another head follows
            *) break ;;
            esac
        done
    else
        dd bs=1 count=1 of="$STATE/first.$ID" 2>/dev/null
        while IFS= read -r line; do header_line "$line"; done <"$STATE/log.$ID"
    fi
    case "$status" in
    200 | 206)
        if [ "$page" = yes ]; then
            verdict=page
        elif [ "$status" = 200 ] && [ "$2" -gt 0 ] || [ "$status" = 206 ] && [ "$from" != "$2" ]; then
            verdict=anew # the range was ignored
        elif cat "$STATE/first.$ID" - 2>"$STATE/write.$ID" >>"$1"; then
            verdict=body
        else
            verdict=unwritten
        fi
        ;;
    esac
    echo "$status $total $verdict" >"$STATE/answer.$ID"
}

transfer() { # path on the server $1, file $2 of $3 bytes -> STATUS TOTAL VERDICT TOOL_STATUS
    local pipe="$STATE/pipe.$ID" tool reader options
    rm -f "$pipe" "$STATE/answer.$ID"
    mkfifo "$pipe" || return 1
    : >"$STATE/log.$ID"
    receive "$2" "$3" <"$pipe" &
    reader=$!
    CHILDREN=$reader
    # the URL goes by a file, as other users of the machine can read command lines
    if [ "$TOOL" = curl ]; then
        printf 'url = "%s%s%s"\n' "$BEFORE" "$1" "$AFTER" >"$STATE/url.$ID"
        options=(-sS -N -i -L -g --max-redirs 10 --connect-timeout "$TIMEOUT" --speed-limit 1 --speed-time "$TIMEOUT")
        [ "$3" -eq 0 ] || options+=(-r "$3-")
        curl "${options[@]}" -K "$STATE/url.$ID" >"$pipe" 2>"$STATE/log.$ID" &
    else
        printf '%s%s%s\n' "$BEFORE" "$1" "$AFTER" >"$STATE/url.$ID"
        options=(-S -nv -t 1 -T "$TIMEOUT" --max-redirect=10 -O -)
        [ "$3" -eq 0 ] || options+=(--start-pos="$3")
        wget "${options[@]}" -o "$STATE/log.$ID" -i "$STATE/url.$ID" >"$pipe" 2>/dev/null &
    fi
    tool=$!
    CHILDREN="$reader $tool"
    wait "$reader"
    STATUS=- TOTAL=- VERDICT=none
    [ ! -f "$STATE/answer.$ID" ] || read -r STATUS TOTAL VERDICT <"$STATE/answer.$ID"
    [ "$VERDICT" = body ] || kill "$tool" 2>/dev/null # nobody reads on
    wait "$tool" 2>/dev/null
    TOOL_STATUS=$?
    CHILDREN=
}

trouble() { # the last thing that the tool said, without the URL
    sed -e 's/[?][^ ]*//g' "$STATE/log.$ID" |
        awk '/^(curl|wget): |failed: |[Rr]ead error|timed out/ { last = $0 } END { print last }'
}

# What the next functions return, other than 0 for whole; but for the last two WHY says in a sentence what happened.
FAILED=1 REFUSED=3 ABSENT=4 UNWRITTEN=5 PAGE=6 MISMATCH=8 UNFINISHED=9

web_page() { # instead of file $1
    WHY="$HOST sent a web page instead of $1 (status $STATUS): a login page, proxy or mail filter stands between;"
    WHY="$WHY copy the URL itself from the e-mail, or try from another network"
    return $PAGE
}

attempt() { # one transfer of path $1 to file $2 with the digest $3, if one is known
    local part="$FOLDER/$2.part" size
    [ "$CAN_RESUME" = yes ] || rm -f "$part"
    size=$(size_of "$part")
    if ! transfer "$1" "$part" "$size"; then
        WHY="cannot make a pipe in $STATE: TMPDIR must name a folder that takes one"
        return $FAILED
    fi
    case "$STATUS $VERDICT" in
    *\ page)
        web_page "$2"
        return
        ;;
    *\ unwritten)
        WHY=$(sed -e 's/^.*: //' "$STATE/write.$ID" | head -n 1)
        WHY="cannot write $part: ${WHY:-the disk refused it}; $(human "$(size_of "$part")")$(of_total) are there:"
        WHY="$WHY make room and run the same command again, it goes on from there"
        return $UNWRITTEN
        ;;
    401* | 403*)
        WHY=$(refusal "$2")
        return $REFUSED
        ;;
    404* | 410*)
        WHY="$HOST has no $1 ($STATUS): is the URL for another family of models than $FOLDER_NAME?"
        return $ABSENT
        ;;
    *\ anew) rm -f "$part" ;;
    416*) # nothing comes after what is here: it is whole, or not this file
        [ "$TOTAL" != "$size" ] || return 0
        [ "$TOTAL" != - ] || [ -z "$3" ] || return 0
        rm -f "$part"
        ;;
    200* | 206*)
        size=$(size_of "$part")
        [ "$TOTAL" != "$size" ] || return 0
        [ "$TOTAL $TOOL_STATUS" != "- 0" ] || return 0
        [ "$TOTAL" = - ] || [ "$size" -lt "$TOTAL" ] || rm -f "$part"
        ;;
    -* | 408* | 429* | 5??*) ;; # no answer, or one that may be another the next time
    *)
        WHY="$HOST answered $STATUS for $2, which no file download should: check the URL, or try again later"
        return $FAILED
        ;;
    esac
    return $UNFINISHED
}

finish() { # file $1 has its length: is it what it should be (digest $2, if one is known)? then it gets its name
    local part="$FOLDER/$1.part"
    if [ ! -s "$part" ]; then
        rm -f "$part"
        WHY="$HOST sent $1 as an empty file: check the URL, or try again later"
        return $FAILED
    elif [ "$(size_of "$part")" -lt 1000000 ] && is_page "$part"; then
        rm -f "$part"
        web_page "$1"
        return
    elif [ "$1" != "${1%.chk}" ] && ! is_checklist "$part"; then
        rm -f "$part"
        WHY="what $HOST sent as $1 is not a list of checksums: check the URL, or try again later"
        return $PAGE
    elif [ -n "$2" ] && ! matches "$part" "$2"; then
        rm -f "$part"
        return $MISMATCH
    elif ! mv -f "$part" "$FOLDER/$1"; then
        WHY="cannot rename $part to $1: is $FOLDER writable?"
        return $FAILED
    fi
}

get_file() { # path on the server $1, name here $2
    local part="$FOLDER/$2.part" expected size status best=0 tries=0 wrong=0 said
    expected=$(listed "$2")
    while :; do
        attempt "$1" "$2" "$expected" && finish "$2" "$expected"
        status=$?
        case $status in
        "$MISMATCH")
            wrong=$((wrong + 1))
            if [ "$wrong" -ge 2 ]; then
                WHY="$2 does not match checklist.chk (it says $expected, the download has $DIGEST), twice;"
                WHY="$WHY it was removed: try again later, or from another network"
                return $FAILED
            fi
            say "  $2: does not match checklist.chk; starting it anew"
            best=0
            continue
            ;;
        "$UNFINISHED") ;;
        *) return $status ;;
        esac
        size=$(size_of "$part")
        if [ "$size" -gt "$best" ]; then
            best=$size
            tries=0
        fi
        tries=$((tries + 1))
        if [ "$tries" -gt "$RETRIES" ]; then
            said=$(trouble)
            [ "$STATUS" = - ] || said="status $STATUS${said:+, $said}"
            said="in $tries tries (${said:-the connection broke off})"
            WHY="$HOST did not deliver $2 $said: check the network and run the same command again"
            [ "$size" -eq 0 ] ||
                WHY="$2 got no further than $(human "$size")$(of_total) $said; it is kept: run the same command again"
            return $FAILED
        fi
        pause "$tries"
    done
}

of_total() { [ "$TOTAL" = - ] || echo " of $(human "$TOTAL")"; }

pause() { # before a new try: 1, 2, 3 ... seconds, never longer than a connection may be silent
    local seconds="$1"
    [ "$seconds" -le "$TIMEOUT" ] || seconds=$TIMEOUT
    [ "$1" -gt 1 ] || seconds=0 # a connection that broke off is usually there again at once
    sleep "$seconds" &
    CHILDREN=$!
    wait "$CHILDREN"
}

# ------------------------------------------------------------------------------------------------- model

# These run beside the main shell, which only waits: so a signal gets through at once. They leave their
# findings as files in $STATE.

as_child() { # a function with its arguments, in a shell that takes its children along when it is ended
    CHILDREN=
    # shellcheck disable=SC2086,SC2064 # several process ids; expanded when the signal comes
    trap 'kill $CHILDREN 2>/dev/null; exit 143' TERM
    trap '' INT
    "$@"
}

start() {
    as_child "$@" &
    RUNNING="$RUNNING $!"
}

wait_for_all() {
    local pid
    for pid in $RUNNING; do
        while kill -0 "$pid" 2>/dev/null; do wait "$pid" 2>/dev/null; done # a trap ends a wait early
    done
    RUNNING=
}

end_all() {
    local pid
    for pid in $RUNNING $PAINTER; do kill -TERM "$pid" 2>/dev/null; done
    for pid in $RUNNING $PAINTER; do wait "$pid" 2>/dev/null; done
    RUNNING=
    PAINTER=
}

check_present() { # marks the files that are already there and match the checklist that is there
    ID=check
    local name expected
    files_of_model . >"$STATE/files"
    while read -r _ _ name; do
        [ -f "$FOLDER/$name" ] || continue
        expected=$(listed "$name")
        if [ -n "$expected" ]; then
            if matches "$FOLDER/$name" "$expected"; then echo "$expected" >"$STATE/there.$name"; fi
        else
            case "$name" in
            *.pth) ;; # the server knows at least how long it is
            *) [ ! -s "$FOLDER/$name" ] || is_page "$FOLDER/$name" || : >"$STATE/there.$name" ;;
            esac
        fi
    done <"$STATE/files"
}

all_present() { # whether every file is marked (and the shards with a checksum) and nothing needs the server
    local need name
    files_of_model . | while read -r need _ name; do
        [ "$need" = may ] || [ -f "$STATE/there.$name" ] || exit 1
        case "$name" in *.pth) [ -s "$STATE/there.$name" ] || exit 1 ;; esac
    done
}

probe() { # where the model is on the server: the first path that has its checklist, or else its params.json
    ID=probe
    local path at status=1 why=
    rm -f "$FOLDER"/*.chk.part
    for path in $(printf '%s' "$PATHS" | tr ',' ' '); do
        at="$path/"
        [ "$path" = . ] && at=
        get_file "${at}checklist.chk" checklist.chk
        status=$?
        case "$status" in
        0)
            echo "$path" >"$STATE/path"
            [ "$TOKENIZER" = beside ] || get_file tokenizer_checklist.chk tokenizer_checklist.chk
            status=$?
            why=${WHY:-}
            break
            ;;
        "$REFUSED" | "$ABSENT") why=${why:-$WHY} ;; # the first path is the one to talk about
        *)
            why=$WHY
            break
            ;;
        esac
        if [ "$CHECKLIST" = maybe ] && get_file "${at}params.json" params.json; then
            echo "$path" >"$STATE/path"
            : >"$STATE/there.params.json"
            status=0
            break
        fi
    done
    [ "$status" = 0 ] || echo "$status $why" >"$STATE/failed"
}

mark_again() { # a new checklist may say something else than the one that the marks were made with
    local name
    files_of_model . | while read -r _ _ name; do
        [ -f "$STATE/there.$name" ] || continue
        [ "$(listed "$name")" = "$(cat "$STATE/there.$name")" ] || rm -f "$STATE/there.$name"
    done
}

worker() { # takes files that nobody has taken until none is left
    ID=$1
    local need path name number=0 status note
    while read -r need path name; do
        number=$((number + 1))
        [ ! -f "$STATE/failed" ] || return 0
        [ ! -f "$STATE/there.$name" ] || continue
        mkdir "$STATE/taken.$number" 2>/dev/null || continue
        if [ -f "$FOLDER/$name" ]; then # it does not match: perhaps its beginning does
            if [ -f "$FOLDER/$name.part" ] || [ ! -s "$FOLDER/$name" ] || is_page "$FOLDER/$name"; then
                rm -f "$FOLDER/$name"
            else
                mv -f "$FOLDER/$name" "$FOLDER/$name.part"
            fi
        fi
        get_file "$path" "$name"
        status=$?
        if [ "$status" = 0 ]; then
            note="no checksum is known for it"
            [ "$need" = must ] || note="as the server has it"
            listed "$name" >"$STATE/there.$name"
            [ ! -s "$STATE/there.$name" ] || note="matches its checksum"
            say "  $name: $(human "$(size_of "$FOLDER/$name")"), $note"
        elif [ "$need" = may ] && [ "$status" != $UNWRITTEN ]; then
            rm -f "$FOLDER/$name.part"
            say "  $name: not to be had at this URL; the terms are at https://www.llama.com"
        else
            echo "$status $WHY" >"$STATE/failed.$ID"
            if [ "$status" != $FAILED ]; then # the other files would fare no better
                mv -f "$STATE/failed.$ID" "$STATE/failed"
                kill -USR1 $$
                return 0
            fi
            complain "$WHY"
        fi
    done <"$STATE/files"
}

on_disk() { # bytes of the weights that are there, whole or not
    local sum=0 file
    for file in "$FOLDER"/consolidated.*; do
        [ ! -f "$file" ] || sum=$((sum + $(wc -c <"$file")))
    done
    echo "$sum"
}

painter() { # one line on the terminal, redrawn every second
    local first started now done_ rate left all=$((MB * 1000000))
    first=$(on_disk)
    started=$(date +%s)
    while sleep 1; do
        done_=$(on_disk)
        now=$(date +%s)
        rate=$(((done_ - first) / (now - started + 1)))
        left=
        if [ "$rate" -gt 0 ] && [ "$all" -gt "$done_" ]; then
            left=$(((all - done_) / rate / 60 + 1))
            left=", $(human "$rate")/s, about $left min left"
        fi
        printf '\r\033[K%s: %s of about %s%s' "$FOLDER_NAME" "$(human "$done_")" "$(human "$all")" "$left" >&2
    done
}

get_model() { # the described model; 0 when it is whole
    local n=0 why status
    rm -rf "${STATE:?}"/*
    mkdir -p "$FOLDER" 2>/dev/null && [ -w "$FOLDER" ] ||
        die "cannot write in $FOLDER: --target DIR names another place"
    say "$FOLDER_NAME"
    is_checklist "$FOLDER/checklist.chk" || rm -f "$FOLDER/checklist.chk"
    start check_present
    wait_for_all
    if [ -f "$FOLDER/checklist.chk" ] && all_present; then
        say "  everything is there and matches checklist.chk"
        return 0
    fi
    start probe
    wait_for_all
    if [ ! -f "$STATE/failed" ]; then
        mark_again
        files_of_model "$(cat "$STATE/path")" >"$STATE/files"
        if [ -t 2 ]; then
            painter &
            PAINTER=$!
        fi
        while [ "$n" -lt "$JOBS" ]; do
            n=$((n + 1))
            start worker "$n"
        done
        wait_for_all
        end_all
    fi
    if [ -f "$STATE/failed" ]; then
        read -r status why <"$STATE/failed"
        complain "$why"
        [ "$status" = $ABSENT ] || HOPELESS=yes # another model may be there
        return 1
    fi
    for why in "$STATE"/failed.*; do [ ! -f "$why" ] || return 1; done
    [ -f "$FOLDER/checklist.chk" ] || UNCHECKED="$UNCHECKED $FOLDER_NAME"
}

check_space() {
    local name need=0 have here
    [ "$SPACE_CHECK" = yes ] || return 0
    for name in $CHOSEN; do
        describe "$name"
        here=$(($(on_disk) / 1000000))
        [ "$here" -lt "$MB" ] && need=$((need + MB - here))
    done
    have=$(df -Pk "$TARGET" 2>/dev/null | awk 'NR == 2 { printf "%d", $4 * 1.024 / 1000 }')
    case "$have" in '' | *[!0-9]*) return 0 ;; esac
    [ "$have" -ge "$need" ] && return 0
    complain "$TARGET has $(human $((have * 1000000))) free and about $(human $((need * 1000000))) are still to come:" \
        "make room, or name another place with --target DIR (--no-space-check skips this)"
    exit 1
}

dry_run() {
    local name need path file
    for name in $CHOSEN; do
        describe "$name"
        say "$FOLDER_NAME ($name, about $(human $((MB * 1000000))))"
        {
            files_of_model "${PATHS%%,*}" | sed -n 's/params.json/checklist.chk/gp'
            [ "$TOKENIZER" = beside ] || echo "must tokenizer_checklist.chk tokenizer_checklist.chk"
            files_of_model "${PATHS%%,*}"
        } | while read -r need path file; do
            say "  $path -> $FOLDER/$file"
        done
    done
}

# -------------------------------------------------------------------------------------------------- main

interrupted() { # $1: the status to leave with
    trap '' INT TERM HUP USR1
    end_all
    complain "interrupted: files that are whole stay, .part files are resumed by the same command"
    exit "$1"
}

clean_up() {
    [ -z "$STATE" ] || rm -rf "$STATE"
}

whole_number() { # value $2 of option $1, from $3 to $4
    case "$2" in
    '' | *[!0-9]* | ?????*) ;;
    *) [ "$((10#$2))" -ge "$3" ] && [ "$((10#$2))" -le "$4" ] && return 0 ;;
    esac
    die "$1 must be a whole number from $3 to $4, not '$2'" 2
}

main() {
    local words='' dry=no name wanted=0 whole=0 bytes=0 folders=
    TARGET=. JOBS=1 TIMEOUT=30 RETRIES=5 SPACE_CHECK=yes CAN_RESUME=yes
    STATE='' RUNNING='' PAINTER='' CHILDREN='' CLEAR='' ANSWER='' ANSWERED=no
    WHY='' DIGEST='' UNCHECKED='' HOPELESS=no
    [ ! -t 2 ] || [ ! -t 1 ] || CLEAR=$'\r\033[K'

    while [ $# -gt 0 ]; do
        case "$1" in
        --target=* | --jobs=* | --timeout=* | --retries=*)
            name=${1%%=*}
            set -- "$name" "${1#*=}" "${@:2}"
            ;;
        --target | --jobs | --timeout | --retries)
            [ $# -ge 2 ] || die "$1 needs a value" 2
            case "$1" in
            --target) TARGET=$2 ;;
            --jobs) whole_number "$1" "$2" 1 32 && JOBS=$2 ;;
            --timeout) whole_number "$1" "$2" 1 3600 && TIMEOUT=$2 ;;
            --retries) whole_number "$1" "$2" 0 1000 && RETRIES=$2 ;;
            esac
            shift 2
            ;;
        --list) list && return 0 ;;
        --dry-run) dry=yes && shift ;;
        --no-space-check) SPACE_CHECK=no && shift ;;
        -h | --help) usage && return 0 ;;
        -*) die "there is no option '$1'; --help shows those there are" 2 ;;
        *) words="$words $1" && shift ;;
        esac
    done
    [ -n "$TARGET" ] || die "--target needs the name of a folder, not ''" 2
    choose "$words" # a wrong name is said before anything is asked

    URL=${PRESIGNED_URL:-}
    if [ "$dry" = no ] || [ -n "$URL" ]; then
        [ "$dry" = yes ] || find_tools
        [ -n "$URL" ] || ask_url
        take_url "$URL"
    fi
    [ -n "$CHOSEN" ] || ask_models
    if [ "$dry" = yes ]; then
        dry_run
        return 0
    fi

    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM
    trap 'interrupted 129' HUP
    trap 'end_all' USR1 # from a worker that knows that the others would fare no better
    trap clean_up EXIT
    mkdir -p "$TARGET" 2>/dev/null || die "cannot make the folder $TARGET: --target DIR names another place"
    check_space
    STATE=$(mktemp -d "${TMPDIR:-/tmp}/llama-download.XXXXXX") || die "TMPDIR must name a folder that can be written"

    for name in $CHOSEN; do
        wanted=$((wanted + 1))
        [ "$HOPELESS" = no ] || continue
        describe "$name"
        if get_model; then
            whole=$((whole + 1))
            bytes=$((bytes + $(on_disk)))
            folders="$folders $FOLDER"
        fi
    done
    if [ "$whole" -lt "$wanted" ]; then
        die "not done: $whole of $wanted models are whole; the same command goes on from here"
    fi
    if [ -n "$UNCHECKED" ]; then
        say "Done, but lengths only were checked, as the server has no checklist.chk for:$UNCHECKED"
    fi
    say "Done: $whole of $wanted models whole ($(human "$bytes")), in$folders"
}

main "$@"
