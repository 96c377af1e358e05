"""
Text to token ids: data/<dataset>/{train.bin, val.bin, meta.json, tokenizer.json}, everything a training run reads.

    python prepare.py config/stdlib.py                              # the source of this Python's standard library: no download
    python prepare.py config/shakespeare.py                         # one text of 1 MB; its last tenth is the validation split
    python prepare.py --dataset=notes --input=notes/,diary.jsonl    # your own .txt .md .py .jsonl files and folders
    python prepare.py --dataset=chat --input=chat.jsonl             # conversations, instructions, preference pairs: see parse below
    python prepare.py --dataset=tinystories --vocab_size=8192       # 2.2 GB of stories (Eldan and Li 2023, arXiv:2305.07759)
    python prepare.py config/gpt2_124m.py --num_shards=10           # FineWeb as GPT-2 tokens, 100M of them per shard

Files are cut into spans, spans grouped into units of about 2 MB. A first pass hashes every document, which finds duplicates and
chooses the validation split; the tokenizer learns from the training split; a second pass encodes the units, on all cores, each into a
file of its own in data/<dataset>/.partial-<hash of text and knobs>; then they are joined. A killed run finds what it had finished and
goes on from there. The output depends on text and knobs, on nothing else.
"""
import collections, dataclasses, functools, glob, hashlib, itertools, json, multiprocessing, os, re, shutil, signal, sys, sysconfig
import threading, time
from concurrent.futures import ProcessPoolExecutor, process
from os.path import basename, exists, join
import numpy as np
import bpe, config

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"      # the shards of modded-nanogpt
HUB = "https://huggingface.co/openai-community/"
GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
BUILT_IN = ("stdlib", "shakespeare", "tinystories", "fineweb")
ENDINGS = (".txt", ".md", ".py", ".jsonl")
UNIT = 2 << 20              # bytes of text per unit of work: enough for a vectorised encoder, not too much to share out evenly
SPLITS = ("train", "val")
FORMS = ("text", "answers", "pairs")
TRAIN, VAL, DROP, FREE = range(4)   # what becomes of a document; FREE: its hash decides

# Bytes start to stop of a file. kind: text (one document), jsonl, stories (many); fate: TRAIN, VAL or FREE. A long text, or a single
# one, makes several spans: their key is its hash, one is its first, one its last.
Span = collections.namedtuple("Span", "path start stop kind fate key first last")

# ---- files, processes, downloads -------------------------------------------------------------------------------------

def size_of(path): return os.path.getsize(path) if exists(path) else 0

def sha256(path):
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()

def write(path, save):
    """Whole or not at all: save(file) fills a temporary file, which becomes `path` once it is safely on the disk."""
    with open(f"{path}.{os.getpid()}", "wb") as f:
        save(f)
        f.flush(); os.fsync(f.fileno())
    os.replace(f.name, path)

def need_space(folder, size):
    free = shutil.disk_usage(folder).free
    if size > free: raise ValueError(f"{folder} needs about {size / 1e6:,.0f} MB of disk space, and {free / 1e6:,.0f} MB are free")

def progress(label, total):
    """add(n bytes), which keeps a line on stderr: how far, how fast, how long still (in a log file: a line every 10 seconds)."""
    done, start, shown, tty = 0, time.time(), time.time(), sys.stderr.isatty()
    def add(n):
        nonlocal done, shown
        done, now = done + n, time.time()
        if tty and done >= total: print(end="\x1b[K", file=sys.stderr, flush=True)
        elif now - shown >= (0.2 if tty else 10):
            rate, shown = max(done, 1) / (now - start), now
            print(f"{label}: {done / max(total, 1):.0%} of {total / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s, "
                  f"{max(total - done, 0) / rate:,.0f} s left", end="\x1b[K\r" if tty else "\n", file=sys.stderr, flush=True)
    return add

def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the parent's to handle; a killed parent cannot say goodbye:
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()

def in_order(function, jobs, workers):
    """Yield function(job) for each job, in order, computed by `workers` processes."""
    if workers == 1: return (yield from map(function, jobs))
    # fork where it is safe: a spawned worker imports the caller's script again, and with train.py that is all of torch
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker)
    try: yield from pool.map(function, jobs)
    except process.BrokenProcessPool: raise OSError("a worker died, for want of memory? Run again with --workers=1") from None
    finally: pool.shutdown(cancel_futures=True)

def fetch(url, path, sha="", stall=30, tries=5, wait=1.0):
    """
    Download url to path, unless it is there: resumed where it stopped (HTTP Range), retried after 1, 2, 4.. seconds, given up after
    `tries` attempts in a row that brought nothing; `stall` seconds of silence end an attempt. Length and sha256 (given, or the hub's
    own, in its header X-Linked-Etag) are verified before the file gets its name. ValueError says where to put the file by hand.
    """
    if exists(path): return
    import requests
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part, failures = path + ".part", 0
    def fail(why):
        raise ValueError(f"cannot download {url}: {why}. Put the file at {path} by hand; config/stdlib.py needs no download")
    while True:
        have = size_of(part)
        ask = {"Accept-Encoding": "identity", "Range": f"bytes={max(have - 1, 0)}-"}    # one byte again: there is always an answer
        try:
            with requests.get(url, headers=ask, stream=True, timeout=(10, stall)) as r:
                if r.status_code == 416 and have: os.remove(part)                       # longer than the file: start over
                elif r.status_code in (401, 403, 404, 410): fail(f"the server says {r.status_code} {r.reason}")
                r.raise_for_status()
                tags = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in (*r.history, r)]
                sha = sha or next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), "")
                span = r.status_code == 206 and re.fullmatch(r"bytes (\d+)-\d+/(\d+)", r.headers.get("Content-Range", ""))
                at, total = map(int, span.groups()) if span else (0, int(r.headers.get("Content-Length") or 0))
                if at > have: fail("the server sent another range than it was asked for")
                need_space(os.path.dirname(path), total - at)
                add = progress(f"download {basename(path)}", total - at)
                with open(part, "r+b" if have else "wb") as f:
                    f.seek(at); f.truncate()
                    for block in r.iter_content(1 << 13): f.write(block); add(len(block))
                    f.flush(); os.fsync(f.fileno())
            if total and size_of(part) != total: raise OSError(f"{size_of(part):,} of {total:,} bytes came")
            if not sha or (found := sha256(part)) == sha: return os.replace(part, path)
            os.remove(part)
            if not have: fail(f"its sha256 is {found}, not {sha}")                      # a resumed file gets one clean attempt
        except OSError as e:                                                            # requests' exceptions are OSErrors, too
            failures = 1 if size_of(part) > have else failures + 1
            if failures >= tries: fail(str(e)[:100])
            print(f"download of {basename(path)} broke off ({str(e)[:100]}), trying again", file=sys.stderr)
            time.sleep(min(wait * 2 ** (failures - 1), 60))

# ---- models of others ------------------------------------------------------------------------------------------------

def pretrained(init_from):
    """The Hugging Face folder that init_from names, downloaded to data/hf/<name> if it is one of GPT-2's; "" for scratch and resume."""
    if init_from in ("scratch", "resume"): return ""
    if init_from in GPT2:
        folder = join("data", "hf", init_from)
        for name in ("config.json", "tokenizer.json", "model.safetensors"): fetch(f"{HUB}{init_from}/resolve/main/{name}", join(folder, name))
        return folder
    if not os.path.isdir(init_from): raise ValueError(f"init_from={init_from!r} is none of scratch, resume, {', '.join(GPT2)}, nor a folder")
    return init_from

def read_tokenizer(path):
    """A tokenizer.json: one that bpe.py saved, or a Hugging Face folder's."""
    return (bpe.Tokenizer.from_hf if "model" in bpe.read(path, json.loads) else bpe.Tokenizer.load)(path)

def own_tokenizer(cfg):
    """cfg with the tokenizer of the model that init_from names: other ids would mean nothing to it."""
    folder = pretrained(cfg.init_from)
    if not folder or cfg.init_from in GPT2 and cfg.tokenizer == "gpt2": return cfg
    return dataclasses.replace(cfg, tokenizer=join(folder, "tokenizer.json"), vocab_size=65536)     # what uint16 holds; the model's is train.py's to check

# ---- files -> spans -> documents -------------------------------------------------------------------------------------

def walk(root, endings=ENDINGS, skip=()):
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if not d.startswith((".", "__pycache__")) and d not in skip]
        found += [join(folder, n) for n in names if n.endswith(endings) and not n.startswith(".")]
    return sorted(found)

def sources(cfg, folder):
    """[(path, kind, fate)] of the files to read, in order, downloaded where missing. kind "single": the one text there is."""
    if cfg.dataset == "tinystories":                        # validation first: a story that is in both stays there
        files = {"TinyStoriesV2-GPT4-valid.txt": VAL, "TinyStoriesV2-GPT4-train.txt": TRAIN}
        for name in files: fetch(TINYSTORIES + name, join(folder, name))
        return [(join(folder, name), "stories", fate) for name, fate in files.items()]
    if cfg.dataset == "stdlib":
        skip = ("test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages")
        paths = walk(sysconfig.get_path("stdlib"), ".py", skip)
    elif cfg.dataset == "shakespeare":
        paths = [join(folder, "input.txt")]
        fetch(SHAKESPEARE, paths[0], SHAKESPEARE_SHA)
        if sha256(paths[0]) != SHAKESPEARE_SHA:
            raise ValueError(f"{paths[0]} is not tiny Shakespeare, whose sha256 is {SHAKESPEARE_SHA}: delete it to download it "
                             "again; a text of your own goes by --dataset=NAME --input=FILE")
    else:
        if not cfg.input: raise ValueError(f"{cfg.dataset!r} is none of {', '.join(BUILT_IN)}: say what to read by --input=FILES")
        paths = []
        for item in [cfg.input] if exists(cfg.input) else map(str.strip, cfg.input.split(",")):
            if not exists(item): raise ValueError(f"--input: there is no file or folder {item!r}")
            found = walk(item) if os.path.isdir(item) else [item] * item.endswith(ENDINGS)
            if not found: raise ValueError(f"--input: nothing to read in {item!r}, only {' '.join(ENDINGS)} files are read")
            paths += found
    if not any(map(size_of, paths)): raise ValueError(f"nothing to read: {', '.join(paths[:3]) or 'the standard library'} is empty")
    return [(path, "jsonl" if path.endswith(".jsonl") else "text" if len(paths) > 1 else "single", FREE) for path in paths]

def cut(path, start, stop, kind, pattern):
    """Yield (start, stop) of consecutive parts of about UNIT bytes: whole lines of jsonl, whole stories, whole words of a text."""
    with open(path, "rb") as f:
        f.seek(start)
        if kind == "text":
            end = start
            for piece in bpe.cut((f.read(min(UNIT, stop - at)) for at in range(start, stop, UNIT)), pattern):
                end += len(piece)
                if end - start >= UNIT: yield start, (start := end)
        while kind != "text" and stop - start > 2 * UNIT:
            f.seek(start + UNIT)
            f.readline()
            while kind == "stories" and (line := f.readline()) and line.strip(b"\r\n") != bpe.ENDOFTEXT.encode(): pass
            yield start, (start := f.tell())
        if start < stop: yield start, stop

def make_units(files, val_fraction, pattern):
    """Lists of spans, about UNIT bytes each, that cover the files in order. Of a single text the last part is for validation."""
    units, held = [[]], 0
    for path, kind, fate in files:
        size, key = os.path.getsize(path), None
        parts = [(0, size, fate)]
        if kind == "single":
            with open(path, "rb") as f:
                middle = f.seek(int(size * (1 - val_fraction)))
                while (byte := f.read(1)) and byte[0] & 0xC0 == 0x80: middle += 1       # on to a whole character
            parts = [(0, middle, TRAIN), (middle, size, VAL)]
        if kind == "single" or kind == "text" and size > 2 * UNIT: key, kind = int(sha256(path)[:16], 16), "text"
        for start, stop, fate in parts:
            for a, b in [(start, stop)] if stop - start <= 2 * UNIT else cut(path, start, stop, kind, pattern):
                if held >= UNIT: held = units.append([]) or 0
                first, last = key is None or a == start, key is None or b == stop
                units[-1].append(Span(path, a, b, kind, fate, key and key ^ start, first, last))
                held += b - a
    return units

def parse(item):
    """
    The object on a line of JSON -> its form and its parts, [(text, counts)]: what counts is learned and ends in an end-of-text, the rest is
    only read. This is the one place that knows the template, which is plain text, so any tokenizer does:
    {"prompt": "Hi", "response": "Hello"} -> ("answers", [("User: Hi\n\nAssistant:", False), (" Hello", True)])
    """
    turn = lambda role, text: role.capitalize() + ": " + text + "\n\n"
    if "text" in item: return "text", [(item["text"], True)]
    if "chosen" in item:
        ask = turn("user", item["prompt"]) + "Assistant:", False
        return "pairs", [ask, (" " + item["chosen"], True), ask, (" " + item["rejected"], True)]
    if "messages" in item: messages = [(m["role"], m["content"]) for m in item["messages"]]
    elif "instruction" in item:
        messages = [("user", item["instruction"] + ("\n\n" + item["input"] if item.get("input") else "")), ("assistant", item["output"])]
    else: messages = [("user", item["prompt"]), ("assistant", item["response"])]
    parts, ask = [], ""
    for role, text in messages:
        if role == "assistant": parts, ask = parts + [(ask + "Assistant:", False), (" " + text, True)], ""
        else: ask += turn(role, text)
    if not parts: raise ValueError("nobody answers")
    return "answers", parts

def documents(span):
    """The documents of a span, empty ones included, as (form, [(bytes, counts)]): see parse; most have one part, and it counts."""
    with open(span.path, "rb") as f:
        f.seek(span.start)
        data = f.read(span.stop - span.start)
    if len(data) < span.stop - span.start: raise ValueError(f"{span.path} changed while it was being read: run again")
    if span.kind == "text": yield "text", [(data, True)]
    elif span.kind == "stories":
        stories = [s.strip(b"\r\n") for s in re.split(rb"(?m)^<\|endoftext\|>\r?$", data)]
        yield from (("text", [(story, True)]) for story in stories[:-1] + stories[-1:] * bool(stories[-1]))
    else:
        for n, line in enumerate(data.split(b"\n")):
            if not line.strip(): continue
            try:
                form, parts = parse(json.loads(line.decode("utf-8", "surrogateescape")))
                yield form, [(to_bytes(text), counts) for text, counts in parts]
            except (ValueError, LookupError, TypeError, AttributeError):
                with open(span.path, "rb") as f: n += sum(f.read(min(UNIT, span.start - i)).count(b"\n") for i in range(0, span.start, UNIT))
                raise ValueError(f'{span.path}, line {n + 1}: not a JSON object with a "text", nor "messages", "prompt" and "response", '
                                 f'"instruction" and "output", or "prompt", "chosen" and "rejected": {line[:60]!r}') from None

def to_bytes(text):
    try: return text.encode("utf-8", "surrogateescape")                         # invalid UTF-8 comes out as it went in
    except UnicodeEncodeError: return text.encode("utf-8", "surrogatepass")     # half a pair, written as \ud83d

def joined(doc): return b"".join(text for text, _ in doc[1])

def hash_of(doc): return int.from_bytes(hashlib.blake2b(doc, digest_size=8).digest(), "little")

def hashes(unit):
    """A row for each document. Of n documents, two different ones pass for duplicates with probability n^2 / 2^65."""
    rows = []
    for span in unit:
        keys = [(hash_of(joined(doc)), FORMS.index(doc[0])) for doc in documents(span)] if span.key is None else [(span.key, 0)]
        rows += [(key, span.first, span.fate, form) for key, form in keys]
    return np.array(rows, [("key", "<u8"), ("first", "?"), ("fate", "u1"), ("form", "u1")])

def choose(found, val_fraction):
    """
    For each unit an array with TRAIN, VAL or DROP for each of its documents, from their hashes: a document's split hangs on its own
    content, so it stays where it is when others are added. Also the numbers of duplicate and of empty documents dropped.
    """
    rows = np.concatenate(found)
    keys, fate = rows["key"][rows["first"]], rows["fate"][rows["first"]]                # all spans of a long text share one fate
    free, empty, again = fate == FREE, keys == np.uint64(hash_of(b"")), np.ones(len(keys), bool)
    fate[free] = keys[free] < np.uint64(val_fraction * 2 ** 64)                         # VAL is 1
    again[np.unique(keys, return_index=True)[1]] = False
    fate[again | empty] = DROP
    kept = np.flatnonzero(fate != DROP)
    if len(kept) < 2: raise ValueError("one document does not make two splits: give more, or a single .txt file")
    for split, pick in ((VAL, np.argmin), (TRAIN, np.argmax)):                          # a few documents may all fall on one side
        if not (fate == split).any():
            fate[kept[pick(keys[kept])]] = split
            print(f"note: by their hashes no document falls into the {SPLITS[split]} split, so one was moved there")
    fates = np.split(fate[np.cumsum(rows["first"]) - 1], np.cumsum([len(unit) for unit in found])[:-1])
    return fates, int((again & ~empty).sum()), int(empty.sum())

# ---- documents -> token ids ------------------------------------------------------------------------------------------

@functools.lru_cache(1)
def load_tokenizer(path):
    """GPT-2's if path is "gpt2". Once per worker: a path never holds two tokenizers, for its folder's name has their hash."""
    try: return bpe.Tokenizer.gpt2() if path == "gpt2" else bpe.Tokenizer.load(path)
    except ValueError as e: raise ValueError(f"{e}; config/stdlib.py needs no download" if path == "gpt2" else e) from None

def encode_unit(job):
    """Encode a unit into an npz file: ids and mask of the training split, of the validation split, and the sizes of both."""
    part, unit, fates, eot, tokenizer, masked = job
    if exists(part): return part                            # the work of a run that was killed
    tok, arrays, sizes = load_tokenizer(tokenizer), [], []
    docs = [(doc, span.last) for span in unit for doc in documents(span)]
    if len(docs) != len(fates): raise ValueError(f"{unit[0].path} or one after it changed while it was being read: run again")
    for split in (TRAIN, VAL):
        chosen = [(doc, last) for (doc, last), fate in zip(docs, fates) if fate == split]
        parts = [(text, counts, eot[:last and counts]) for (_, doc), last in chosen for text, counts in doc]
        encoded = tok.encode_batch(text for text, _, _ in parts)
        arrays.append(np.concatenate([eot[:0], *(a for one, (_, _, end) in zip(encoded, parts) for a in (one, end))]))
        lengths = [len(one) + len(end) for one, (_, _, end) in zip(encoded, parts)]
        arrays.append(np.repeat(np.array([counts for _, counts, _ in parts], np.uint8), lengths) if masked else np.empty(0, np.uint8))
        sizes.append((sum(last for _, last in chosen), sum(len(text) for text, _, _ in parts), sum(len(text) for text, counts, _ in parts if counts)))
    write(part, lambda f: np.savez(f, *arrays, sizes))
    return part

def read_part(path):
    """(split, ids, mask, documents, bytes, bytes that count) of both splits."""
    with np.load(path) as part: return [(split, part[f"arr_{2 * i}"], part[f"arr_{2 * i + 1}"], *part["arr_4"][i]) for i, split in enumerate(SPLITS)]

def read_shards(folder, num_shards, tok):
    """Yield the same, without masks, of FineWeb's shards: 256 int32 (20240520, version 1, number of tokens, zeros), then uint16 tokens."""
    lengths = np.array([len(tok.decode_bytes([i])) for i in range(tok.vocab_size - 1)] + [0])
    for n in range(num_shards + 1):
        split = "train" if n else "val"
        path = join(folder, f"fineweb_{split}_{n:06d}.bin")
        fetch(FINEWEB + basename(path), path)
        head = np.fromfile(path, "<i4", 256)
        whole = head[:2].tolist() == [20240520, 1] and size_of(path) == 1024 + 2 * head[2]
        ids = np.fromfile(path, "<u2", offset=1024) if whole else None
        if not whole or ids.max(initial=0) >= tok.vocab_size:
            raise ValueError(f"{path} is not a whole shard of GPT-2 tokens: delete it to download it again")
        counts = sum(np.bincount(part, minlength=tok.vocab_size) for part in np.array_split(ids, len(ids) // UNIT + 1))
        yield split, ids, ids[:0], counts[-1], counts @ lengths, 0

# ---- the dataset's folder --------------------------------------------------------------------------------------------

def knobs(cfg):
    """The knobs that decide what is in data/<dataset>. ValueError for what cannot be right."""
    if not re.fullmatch(r"\w[\w.-]*", cfg.dataset):
        raise ValueError(f"dataset={cfg.dataset!r} is not a plain name: letters, digits, _ . -")
    if cfg.input and cfg.dataset in BUILT_IN:
        raise ValueError(f"--input={cfg.input} needs a name of its own, --dataset=NAME: {cfg.dataset!r} is taken")
    if cfg.dataset == "fineweb" and cfg.tokenizer != "gpt2":
        raise ValueError("fineweb comes as GPT-2 tokens: it needs --tokenizer=gpt2")
    result = {"tokenizer": cfg.tokenizer} | ({"input": cfg.input} if cfg.input else {})
    if cfg.tokenizer == "bpe":
        if not 256 <= cfg.vocab_size <= 65536:
            raise ValueError(f"vocab_size={cfg.vocab_size} must lie between 256, the bytes, and 65536, what uint16 holds")
        result |= {"vocab_size": cfg.vocab_size, "split_pattern": cfg.split_pattern}
    elif cfg.tokenizer != "gpt2":
        if not os.path.isfile(cfg.tokenizer): raise ValueError(f"tokenizer={cfg.tokenizer!r} is neither bpe nor gpt2 nor a file")
        result["tokenizer"] = sha256(cfg.tokenizer)
    if cfg.dataset == "fineweb": return result | {"num_shards": cfg.num_shards}
    return result | ({} if cfg.dataset == "tinystories" else {"val_fraction": cfg.val_fraction})    # it has a validation split

def check_vocab(cfg, size):
    limit = min(cfg.vocab_size, 65536)                      # what uint16 holds
    if size > limit: raise ValueError(f"the tokenizer has {size} tokens, more than {limit}: set vocab_size to at least that, at most 65536")

def prepared(cfg): return exists(join("data", cfg.dataset, "meta.json"))

def verify(cfg, deep=False):
    """
    The contents of meta.json. FileNotFoundError if the dataset is not prepared; ValueError, with the remedy, if it was prepared with
    other knobs than cfg's or its bins are not whole. deep: compares their sha256, too.
    """
    folder, again, wanted = join("data", cfg.dataset), "run prepare.py with this config again", knobs(cfg)
    if not prepared(cfg): raise FileNotFoundError(f"{folder} is not prepared: run prepare.py with this config")
    try:
        with open(join(folder, "meta.json"), encoding="utf-8") as f: meta = json.load(f)
    except ValueError: raise ValueError(f"{folder}/meta.json is damaged: {again}") from None
    for key, value in wanted.items():
        found = meta["knobs"].get(key)
        same = key == "tokenizer" and os.path.isfile(cfg.tokenizer) and read_tokenizer(cfg.tokenizer).hash == meta["tokenizer_hash"]
        if found != value and not same: raise ValueError(f"{folder} was prepared with {key}={found!r}, not {getattr(cfg, key)!r}: {again}")
    check_vocab(cfg, meta["vocab_size"])
    for name, digest in meta["sha256"].items():
        split, _, mask = name.partition(".")
        path, size = join(folder, name if mask else name + ".bin"), meta["tokens"][split] * (1 if mask else 2)
        if size_of(path) != size: raise ValueError(f"{path} has {size_of(path):,} bytes, not {size:,}: {again}")
        if deep and sha256(path) != digest: raise ValueError(f"{path} has not the sha256 of meta.json: {again}")
    return meta

def write_bins(work, parts, masked):
    """Join all that read_part yields to train.bin and val.bin, and their masks; returns what meta.json says about them."""
    meta = {key: dict.fromkeys(SPLITS, 0) for key in ("tokens", "documents", "bytes")}
    answers = {key: dict.fromkeys(SPLITS, 0) for key in ("tokens", "bytes")}
    files = {name: open(join(work, name), "wb") for split in SPLITS for name in (f"{split}.bin", f"{split}.mask")[:1 + masked]}
    for split, ids, mask, documents, size, counted in parts:
        ids.astype("<u2", copy=False).tofile(files[f"{split}.bin"])
        if masked: mask.tofile(files[f"{split}.mask"])
        for key, n in (("tokens", len(ids)), ("documents", documents), ("bytes", size)): meta[key][split] += int(n)
        for key, n in (("tokens", mask.sum()), ("bytes", counted)): answers[key][split] += int(n)
    for f in files.values(): f.flush(); os.fsync(f.fileno()); f.close()
    return meta | ({"answers": answers} if masked else {}) | {"sha256": {name.removesuffix(".bin"): sha256(f.name) for name, f in files.items()}}

def main(cfg):
    cfg = own_tokenizer(cfg)
    folder, fineweb, start = join("data", cfg.dataset), cfg.dataset == "fineweb", time.time()
    meta = {"dataset": cfg.dataset, "source": cfg.input or cfg.dataset, "knobs": knobs(cfg)}
    tok = read_tokenizer(cfg.tokenizer) if cfg.tokenizer not in ("bpe", "gpt2") else None
    if tok: check_vocab(cfg, tok.vocab_size)
    def every(label, function, jobs):                       # the units' results, in order, from all cores
        add = progress(label, sum(sizes))
        for size, result in zip(sizes, in_order(function, jobs, min(cfg.workers or os.cpu_count(), len(units)))):
            add(size)
            yield result
    if not fineweb:
        files = sources(cfg, folder)
        single = files[0][1] == "single"
        pattern = tok.pattern if tok else bpe.GPT4_SPLIT if cfg.tokenizer == "bpe" and cfg.split_pattern == "gpt4" else bpe.GPT2_SPLIT
        units = make_units(files, cfg.val_fraction, pattern)
        sizes = [sum(span.stop - span.start for span in unit) for unit in units]
        found = list(every("read", hashes, units))
        fates, meta["duplicates"], meta["empty"] = choose(found, cfg.val_fraction)
        forms = {FORMS[i] for rows in found for i in np.unique(rows["form"])}
        if "pairs" in forms and len(forms) > 1: raise ValueError("preference pairs need a dataset of their own: these files have other texts, too")
        if forms != {"text"}: meta["form"] = "pairs" if "pairs" in forms else "answers"
        meta["text_hash"] = hashlib.sha256(b"".join(rows.tobytes() for rows in found)).hexdigest()
        print(f"{meta['source']}: {sum(sizes):,} bytes in {len(files):,} files, dropped {meta['duplicates']:,} duplicate and "
              f"{meta['empty']:,} empty documents", flush=True)
        if not single and (bpe.ENDOFTEXT not in tok.special_tokens if tok else cfg.tokenizer == "bpe" and cfg.vocab_size == 256):
            raise ValueError(f"the tokenizer has no {bpe.ENDOFTEXT} to put between documents: for bpe set vocab_size to 257 or more")
    if prepared(cfg):
        try:
            old = verify(cfg)
            if all(old.get(key) == meta[key] for key in meta): return print(f"{folder} is prepared already, nothing to do")
            print(f"preparing again: the text has changed since {folder} was prepared")
        except ValueError as e: print(f"{e}: doing that")
    path, work = "gpt2", join(folder, ".partial-" + hashlib.sha256(json.dumps(meta).encode()).hexdigest()[:16])
    if cfg.tokenizer == "gpt2": tok = load_tokenizer("gpt2")

    os.makedirs(work, exist_ok=True)
    need_space(work, 4e8 * (cfg.num_shards + 1) if fineweb else 2 * sum(sizes) * (2 if cfg.vocab_size < 1024 else 1))   # parts, bins
    if cfg.tokenizer != "gpt2":
        path = join(work, "tokenizer.json")
        if not tok and not exists(path):
            texts = (joined(doc) for unit, fate in zip(units, fates) for doc, f in zip(itertools.chain(*map(documents, unit)), fate) if f == TRAIN)
            special = (bpe.ENDOFTEXT,) if cfg.vocab_size > 256 else ()                  # 256 are the bytes and nothing else
            tok = bpe.Tokenizer.train(texts, cfg.vocab_size, pattern, special, 1 if cfg.workers == 1 else None, sys.stderr.isatty())
        if tok: tok.save(path)
        tok = load_tokenizer(path)
    check_vocab(cfg, tok.vocab_size)
    eot = tok.special_tokens.get(bpe.ENDOFTEXT)
    if fineweb: parts = read_shards(folder, cfg.num_shards, tok)
    else:
        ends = np.array([] if single else [eot], "<u2")                                 # a single text has nothing to separate
        jobs = [(join(work, f"{n:06d}.npz"), *job, ends, path, "form" in meta) for n, job in enumerate(zip(units, fates))]
        if done := sum(exists(job[0]) for job in jobs): print(f"going on: {done} of {len(jobs)} units are encoded", flush=True)
        parts = itertools.chain.from_iterable(map(read_part, list(every("encode", encode_unit, jobs))))
    meta |= write_bins(work, parts, "form" in meta) | {"vocab_size": tok.vocab_size, "dtype": "uint16", "eot": eot, "tokenizer": basename(path),
                                       "tokenizer_hash": tok.hash}
    write(join(work, "meta.json"), lambda f: f.write(json.dumps(meta, indent=1).encode()))

    for name in ("meta.json", "tokenizer.json", "train.mask", "val.mask"):      # without meta.json there is no dataset: nobody sees half of one
        if exists(join(folder, name)): os.remove(join(folder, name))
    for name in ("train.bin", "val.bin", "train.mask", "val.mask", "tokenizer.json", "meta.json"):
        if exists(join(work, name)): os.replace(join(work, name), join(folder, name))
    for old in glob.glob(join(folder, ".partial-*")): shutil.rmtree(old)
    counts = [f"{split} {meta['tokens'][split]:,} tokens of {meta['documents'][split]:,} documents" for split in SPLITS]
    print(f"{folder}: {', '.join(counts)}, {meta['bytes']['train'] / meta['tokens']['train']:.2f} bytes per token, in {time.time() - start:.1f} s")


if __name__ == "__main__":
    config.run(main)
