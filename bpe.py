"""
Byte-level byte pair encoding (BPE): train a tokenizer, encode, decode. One file, numpy whole-array operations.

Split the text into words by a regular expression; a word starts as its UTF-8 bytes, ids 0..255. Training: again and again take the most
frequent pair of neighbouring ids and give it the next id. Encoding: in each word merge the pair learned first, until none is left.

    python bpe.py input.txt --vocab_size=4096 --out=tok.json        # then, in Python:
    tok = Tokenizer.load("tok.json"); ids = tok.encode("hello"); text = tok.decode(ids)

Fast, because words are found and counted with array operations on bytes, each distinct word is merged once however often it occurs, and
pairs are merged many at a time wherever this provably equals one at a time (`learn_merges`). Ids equal tiktoken's, merges rustbpe's:
between equally frequent pairs the smallest (left id, right id) wins. Bytes that are not valid UTF-8 are kept, each a character that is
neither letter, number nor space: decode_bytes(encode(b)) == b for any bytes. In a str, lone surrogates become U+FFFD, as in tiktoken.

References: Sennrich, Haddow, Birch 2016 (arXiv:1508.07909); Radford et al. 2019 (GPT-2: bytes, split pattern, merges file); tiktoken
(GPT-4's pattern, rank files); minbpe and rustbpe, A. Karpathy (the plain algorithm; the tie rule).
"""
# Notation: a word is what the pattern cuts out of the text; starts and lens are the words' offsets and lengths in bytes.
# Inside, ids are 0..255 for bytes and 256 + i for merge i; `ids` maps them to a vocabulary's own numbering (GPT-2 has one).
import base64, codecs, collections, functools, hashlib, itertools, json, os, re, signal, sys, threading, time
import numpy as np

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4_SPLIT = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
# what tiktoken itself writes: for GPT-2 the same; for GPT-4 (cl100k_base) white space at the end of the text is one word
GPT2_TIKTOKEN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_SPLIT = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
# Qwen's: as GPT-4's, but every digit is a word; and how Llama 3 writes GPT-4's
QWEN_SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
SAME_SPLIT = {GPT2_TIKTOKEN: GPT2_SPLIT, QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"): GPT4_SPLIT}
ENDOFTEXT = "<|endoftext|>"
CHUNK = 1 << 18            # bytes split at once: their arrays stay in the cache
BATCH = 1 << 23            # bytes sent to a worker process at once
HERE = 2                   # jobs done before worker processes are started, which takes time
CACHE = 1 << 20            # words whose ids the encoder remembers
HOT = 1024                 # pairs the trainer keeps in sight
LONG = 256                 # bytes; longer words are rare and left to tiktoken's engine
NONE = np.iinfo(np.int32).max

# ---- Text to words --------------------------------------------------------------------------------------------------------------

SPACE, WHITE, NEWLINE, LETTER, NUMBER, OTHER, EDGE, UNKNOWN = range(8)   # classes of characters; an EDGE parts two texts
ASCII = bytes(SPACE if c == 32 else NEWLINE if c in (10, 13) else WHITE if c in (9, 11, 12) else NUMBER if 48 <= c <= 57
              else LETTER if 65 <= c <= 90 or 97 <= c <= 122 else OTHER for c in range(256))
MAYBE_WHITE = np.isin(np.arange(256), [*range(9, 14), 32, *range(0x80, 0x8B), 0x9F, 0xA0, 0xA8, 0xA9, 0xAF])   # as last byte
VISIBLE_SPACE_VISIBLE = re.compile(rb".*[!-~]( )[!-~]", re.S)
LAST_ASCII = re.compile(rb".*([\x00-\x7f])", re.S)

CLASS = np.full(0x110000, UNKNOWN, np.uint8)   # of code points, found when they first occur
CLASS[0xD800:0xE000] = OTHER

def classes(code):
    """Class of each code point. Asked of tiktoken's own engine: other Unicode versions differ in 17,000 of them."""
    new = np.unique(code[CLASS[code] == UNKNOWN]).astype("<u4")
    if len(new):
        import tiktoken
        CLASS[new] = OTHER
        for cls, regex in (LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (WHITE, r"\s+"):
            plain = tiktoken.Encoding("bytes", pat_str=regex, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
            found = bytes(plain.encode_ordinary(new.tobytes().decode("utf-32-le"))).decode()   # what matches, without the rest
            CLASS[np.frombuffer(found.encode("utf-32-le"), "<u4")] = cls
    return CLASS[code]

def characters(raw, edges, fold):
    """-> class and first byte of every character of raw, and its offset (None if every character is one byte)."""
    buf, cls = np.frombuffer(raw, np.uint8), np.frombuffer(bytearray(raw.translate(ASCII)), np.uint8)
    cls[edges] = EDGE
    if raw.isascii():
        return cls, buf, None
    near = buf >= 0x80
    near[1:] |= buf[:-1] >= 0x80   # with the byte after each run, which keeps runs apart, the rest can be decoded on its own
    at = np.flatnonzero(near)
    code = np.frombuffer(buf[at].tobytes().decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), "<u4")
    size = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    size[(code >= 0xDC80) & (code < 0xDD00)] = 1   # a byte that is not UTF-8
    first = at[np.cumsum(size) - size]
    cls[first] = np.where(code < 0x80, cls[first], classes(code))
    near[:] = True
    near[at], near[first] = False, True
    offset = np.flatnonzero(near)
    letter = buf[offset]
    if fold:   # U+017F, the long s, is an s to a pattern that ignores case
        letter[np.searchsorted(offset, first[code == 0x17F])] = ord("s")
    return cls[offset], letter, offset

def contractions(start, letter, fold):
    """Where 's 'd 'm 't 'll 've 're stand at the start of a word -> (positions of the apostrophe, positions after the last letter)."""
    at = np.flatnonzero((letter == ord("'")) & start)
    a, b = (letter[np.minimum(at + i, len(letter) - 1)].astype(np.int64) | (0x20 if fold else 0) for i in (1, 2))
    one, two = np.isin(a, list(b"sdmt")), np.isin(a << 8 | b, [0x6C6C, 0x7665, 0x7265])
    return at[one | two], np.where(one, at + 2, at + 3)[one | two]

def split_gpt2(c, letter):
    """Classes and letters of a text's characters -> True where a word starts."""
    white, before, after, start = c <= NEWLINE, c[:-1], c[1:], np.ones(len(c), bool)
    # a word is a run of one class with at most one space before it; a run of white space leaves its last character to what follows
    start[1:] = np.where(white[1:], ~white[:-1], (before != after) & (before != SPACE))
    start[:-1] |= white[:-1] & ~white[1:] & (after != EDGE)
    at, end = contractions(start, letter, False)
    start[at + 1], start[end] = False, True
    return start

def split_gpt4(c, letter, trailing, digits):
    """The same for GPT-4's patterns. trailing: white space at the end of a text is one word; a number has up to so many digits."""
    before, after, start = c[:-1], c[1:], np.ones(len(c), bool)
    start[1:] = (before != after) & np.where(
        after == NEWLINE, (before > NEWLINE) & (before != OTHER),   # punctuation takes the newlines that follow it
        (after > NEWLINE) & ~((before == SPACE) & (after == OTHER)) & ~((before <= WHITE) & (after == LETTER)))
    # Runs of white space without newlines, from `first` to `end`: up to a newline they are one word with it; the last character
    # before a word stands apart or joins that word.
    c0 = np.append(np.uint8(EDGE), c)   # c0[i + 1] is c[i]
    turns = np.flatnonzero((c0[1:] <= WHITE) != (c0[:-1] <= WHITE))
    first, end = turns[::2], turns[1::2]
    line = np.flatnonzero((c0[1:] == NEWLINE) & (c0[:-1] != NEWLINE))   # where runs of newlines start
    line = np.append(line, 0)[np.searchsorted(line, first) - 1]
    goes_on = (c0[end + 1] == NEWLINE) | (trailing & (c0[end + 1] == EDGE))
    start[first] = (c0[first] != NEWLINE) | ~goes_on | (c0[line] == OTHER)
    start[(end - 1)[(c0[end + 1] > NEWLINE) & (c0[end + 1] < EDGE)]] = True
    start[1:] &= ~((before == OTHER) & (after == LETTER) & start[:-1])   # a single character joins letters, unless a space took it
    start[contractions(start, letter, True)[1]] = True
    digit = np.flatnonzero(c == NUMBER)
    i = np.arange(len(digit))
    start[digit] = (i - np.maximum.accumulate(np.where(start[digit], i, 0))) % digits == 0
    return start

def split(texts, pattern):
    """list of bytes -> (their bytes in one piece, starts and lens of the words, number of words up to the end of each text)."""
    raw = b"".join([part for text in texts for part in (text, b"\n")])
    edges = np.cumsum([len(text) + 1 for text in texts]) - 1   # the "\n" put in after each text: they belong to no word
    c, letter, offset = characters(raw, edges, pattern != GPT2_SPLIT)
    start = split_gpt2(c, letter) if pattern == GPT2_SPLIT else split_gpt4(c, letter, pattern == CL100K_SPLIT, 1 if pattern == QWEN_SPLIT else 3)
    edge = edges if offset is None else np.flatnonzero(c == EDGE)
    start[edge] = start[edge[:-1] + 1] = True
    starts = np.flatnonzero(start) if offset is None else offset[start]
    drop = np.searchsorted(starts, edges)
    return raw, np.delete(starts, drop), np.delete(np.diff(starts, append=len(raw)), drop), drop - np.arange(len(drop))

def as_bytes(text):
    try:
        return text.encode() if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError:   # lone surrogates
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()

def cut(blocks, pattern, normalizer=None):
    """The parts, str or bytes, of one text -> pieces of about CHUNK bytes whose words together are the words of the whole.

    No pattern looks back, so any word start will do before which no white space stands (that looks ahead) and after which enough text
    follows for it to be certain. A space between two visible ASCII characters is such a place; without one near the end, ask `split`.
    """
    held, n, want = [], 0, CHUNK
    for block in normalized(blocks) if normalizer else map(as_bytes, blocks):
        for i in range(0, len(block), CHUNK):
            held.append(block[i:i + CHUNK])
            n += len(held[-1])
            if n < want:
                continue
            text = b"".join(held)
            space = VISIBLE_SPACE_VISIBLE.match(text, max(0, n - 1024))
            at = space.start(1) if space else 0
            if not space:
                starts = split([text], pattern)[1]
                starts = starts[(starts > 0) & (starts < n - 8)]
                at = int(starts[~MAYBE_WHITE[np.frombuffer(text, np.uint8)[starts - 1]]][-1:].sum())   # the last, or 0
            if at:
                yield text[:at]
            held, n = [text[at:]], n - at
            want = max(CHUNK, n + 1) if at else 2 * n
    yield b"".join(held)

def normalized(blocks):
    """The parts of one text, in Unicode's normal form C. No character composes with ASCII after it: the text may be cut before ASCII."""
    import unicodedata
    held = []
    for block in itertools.chain(map(as_bytes, blocks), [None]):
        last = block and LAST_ASCII.match(block)
        if block is None or last:
            text = b"".join(held) + (block[:last.start(1)] if last else b"")
            yield unicodedata.normalize("NFC", text.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
            held, block = [], block[last.start(1):] if last else b""
        held.append(block)

def groups(pieces, size):
    """Lists of consecutive pieces, about `size` bytes each."""
    group, n = [], 0
    for piece in pieces:
        group.append(piece)
        n += len(piece) + 1
        if n >= size:
            yield group
            group, n = [], 0
    if group:
        yield group

def gather(buf, starts, lens):
    """The slices buf[start:start + len], end to end."""
    end = np.cumsum(lens)
    return buf[np.repeat(starts - (end - lens), lens) + np.arange(end[-1] if len(end) else 0)]

def runs(keys):
    """Where each run of equal keys starts. [3, 3, 5] -> [0, 2]"""
    return np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[:len(keys)])

# ---- Words to numbers -----------------------------------------------------------------------------------------------------------

U = np.uint64
MIX = [U(int.from_bytes(os.urandom(8), "little") | 1) for _ in range(3)]
KEEP = np.array([(1 << 8 * i) - 1 for i in range(9)], U)   # KEEP[i] keeps the first i bytes

def word_keys(raw, starts, lens):
    """A uint64 for every word. Up to 7 bytes it is the word itself, its length in the top byte; a longer word gets a 63-bit hash under
    multipliers drawn at random by each process: among a million distinct words two collide with probability 1e-7, whatever the text."""
    block = np.frombuffer(raw + bytes(16 - len(raw) % 8), "<u8")
    def load(at):   # the 8 bytes from any offset, out of two aligned words
        shift = (at & 7).astype(U) << U(3)
        return (block[at >> 3] >> shift) | (block[(at >> 3) + 1] << U(1) << (U(63) - shift))
    keys = (load(starts) & KEEP[np.minimum(lens, 8)]) | lens.astype(U) << U(56)
    for i in range(0, min(LONG, int(lens.max(initial=0))), 8):
        go = np.flatnonzero(lens > max(i, 7))
        h = ((keys[go] if i else lens[go].astype(U) * MIX[2]) ^ (load(starts[go] + i) & KEEP[np.minimum(lens[go] - i, 8)])) * MIX[0]
        keys[go] = ((h ^ h >> U(32)) * MIX[1]) | U(1 << 63)
    for i in np.flatnonzero(lens > LONG):
        keys[i] = hash(raw[starts[i]:starts[i] + lens[i]]) & (1 << 63) - 1 | 1 << 63
    return keys

def room(a, n):
    """`a`, or a longer copy with room for n entries."""
    return a if n <= len(a) else np.concatenate([a, np.zeros(max(n - len(a), len(a)), a.dtype)])

class Table:
    """Distinct uint64 keys, numbered in the order they are added. Open addressing, linear probing, at most half full."""

    def __init__(self, keys=np.zeros(0, U)):
        self.n, self.keys, self.numbers, self.kept = 0, np.zeros(1 << 12, U), np.full(1 << 12, -1, np.int32), []
        self.add(keys)

    def slots(self, keys):
        return (keys * MIX[2] >> U(65 - len(self.keys).bit_length())).view(np.int64)

    def find(self, keys):
        """-> number of each key, int32, -1 where it is not in the table."""
        slot = self.slots(keys)
        out = self.numbers.take(slot)
        todo = np.flatnonzero((self.keys.take(slot) != keys) & (out >= 0))   # another key sits there: try the next slot
        while len(todo):
            slot[todo] = s = (slot[todo] + 1) & (len(self.keys) - 1)
            out[todo] = self.numbers[s]
            todo = todo[(self.keys[s] != keys[todo]) & (out[todo] >= 0)]
        return out

    def add(self, keys):
        """Number new, distinct keys."""
        numbers = np.arange(self.n, self.n + len(keys), dtype=np.int32)
        self.n += len(keys)
        if 2 * self.n > len(self.keys):
            old, size = self.numbers >= 0, 1 << (2 * self.n).bit_length()
            keys, numbers = np.concatenate([self.keys[old], keys]), np.concatenate([self.numbers[old], numbers])
            self.keys, self.numbers = np.zeros(size, U), np.full(size, -1, np.int32)
        slot, todo = self.slots(keys), np.arange(len(keys))
        while len(todo):
            free = todo[self.numbers[slot[todo]] < 0]
            self.keys[slot[free]], self.numbers[slot[free]] = keys[free], numbers[free]   # of several, the last one stays
            todo = todo[self.numbers[slot[todo]] != numbers[todo]]
            slot[todo] = (slot[todo] + 1) & (len(self.keys) - 1)

    def words(self, raw, starts, lens):
        """Numbers of words, new ones included: these are kept, end to end, until `new` takes them."""
        keys = word_keys(raw, starts, lens)
        number = self.find(keys)
        miss = np.flatnonzero(number < 0)
        miss = miss[np.argsort(keys[miss])]
        first = runs(keys[miss])
        number[miss] = self.n + np.repeat(np.arange(len(first)), np.diff(first, append=len(miss)))
        first = miss[first]
        self.add(keys[first])
        self.kept.append((gather(np.frombuffer(raw, np.uint8), starts[first], lens[first]), lens[first]))
        return number

    def new(self):
        """-> (their bytes, their lens), in the order of their numbers."""
        texts, lens = zip((np.zeros(0, np.uint8), np.zeros(0, np.int64)), *self.kept)
        self.kept = []
        return np.concatenate(texts), np.concatenate(lens)

def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the parent's to handle; and a killed parent cannot say goodbye:
    import multiprocessing
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()

def in_order(function, jobs, workers):
    """Yield function(job) for each job, in order, computed by `workers` processes. At most two jobs for each are under way: memory is
    bounded. OSError if a process dies."""
    jobs, waiting = iter(jobs), collections.deque()
    yield from map(function, jobs if workers == 1 else itertools.islice(jobs, HERE))
    if not (head := list(itertools.islice(jobs, 1))):
        return
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
    # fork where it is safe: a spawned worker imports the caller's script again, and with train.py that is all of torch
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"), start_worker)
    try:
        for job in itertools.chain(head, jobs):
            waiting.append(pool.submit(function, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise OSError("a worker process died, for want of memory? Run again with --workers=1") from None
    finally:
        pool.shutdown(cancel_futures=True)

def count_words(pieces, pattern):
    """list of bytes -> (distinct words end to end, their lens, their counts as int64); runs in a worker."""
    words, counts = Table(), np.zeros(0, np.int64)
    for group in groups(pieces, CHUNK):
        number = words.words(*split(group, pattern)[:3])
        old, counts = counts, np.bincount(number, minlength=words.n)
        counts[:len(old)] += old
    return *words.new(), counts

def count_parallel(pieces, pattern, workers, add):
    """The same for any number of pieces."""
    words, counts = Table(), np.zeros(0, np.int64)
    for text, lens, times in in_order(functools.partial(count_words, pattern=pattern), groups(pieces, BATCH), workers):
        number = words.words(text.tobytes(), np.cumsum(lens) - lens, lens)
        counts = np.append(counts, np.zeros(words.n - len(counts), np.int64))
        counts[number] += times
        add(int(lens @ times))
    return *words.new(), counts

# ---- Merging --------------------------------------------------------------------------------------------------------------------

def every_other(pos, before):
    """Sorted positions of a pair, and the positions before each -> a mask. In a run of a's each (a, a) overlaps the next: keep the
    first, third, ... of each run."""
    i, alone = np.arange(len(pos)), np.ones(len(pos), bool)
    alone[1:] = before[1:] != pos[:-1]
    return (i - np.maximum.accumulate(np.where(alone, i, 0))) % 2 == 0

class Pairs:
    """The neighbouring pairs of a list of words: key (left << 32 | right), count, and where they are.

    The words stand in linked lists (sym, nxt, prv) with a separator -1 around each. pid[pos] is the pair that starts at pos, so a
    position that has changed since it was stored shows in one comparison. The positions of pair p are pool[begin[p]:begin[p + 1]].
    """

    def __init__(self, text, lens, counts):
        self.sep = np.append(0, np.cumsum(lens + 1))
        n = int(self.sep[-1]) + 1
        self.sym = np.zeros(n, np.int32)
        self.sym[self.sep] = -1
        self.sym[self.sym >= 0] = text
        self.nxt, self.prv = np.arange(1, n + 1, dtype=np.int32), np.arange(-1, n - 1, dtype=np.int32)
        self.weight = np.append(0, np.repeat(counts, lens + 1))    # how often the word around a position occurs
        self.pid = np.full(n, -1, np.int32)
        self.n, self.key, self.count, self.begin, self.pool = 0, *(np.zeros(n, t) for t in (np.int64, np.int64, np.int64, np.int32))
        self.store(np.flatnonzero(self.sym >= 0).astype(np.int32))

    def store(self, at):
        """Enter the pairs that start at these positions, all new; -> their numbers."""
        right = self.sym[self.nxt[at]]
        at, right = at[right >= 0], right[right >= 0]
        key = self.sym[at].astype(np.int64) << 32 | right
        order = np.argsort(key) if self.n else np.argsort((key >> 24 | key & 255).astype(np.uint16), kind="stable")   # bytes: radix sort
        at, key = at[order], key[order]
        first = runs(key)
        n, self.n, used = self.n, self.n + len(first), int(self.begin[self.n])
        self.key, self.count, self.begin = room(self.key, self.n), room(self.count, self.n), room(self.begin, self.n + 1)
        self.pool = room(self.pool, used + len(at))
        new = np.arange(n, self.n)
        if len(new):
            self.key[new], self.count[new] = key[first], np.add.reduceat(self.weight[at], first)
            self.begin[n:self.n + 1] = used + np.append(first, len(at))
            self.pool[used:used + len(at)] = at
            self.pid[at] = np.repeat(new, np.diff(first, append=len(at)))
        return new

    def positions(self, pairs):
        """-> positions of these pairs, and for each position the index of its pair."""
        parts = [self.pool[i:j] for i, j in zip(self.begin[pairs].tolist(), self.begin[pairs + 1].tolist())]
        pos, who = np.concatenate(parts), np.repeat(np.arange(len(pairs)), list(map(len, parts)))
        live = self.pid[pos] == pairs[who]
        return pos[live], who[live]

    def merge(self, pairs, pos, who, base):
        """Replace pairs, found at (pos, who), by the symbols base, base + 1, ...; -> the numbers of the pairs this makes."""
        if len(pairs) == 1:    # it may be (a, a)
            pos = np.sort(pos)
            pos = pos[every_other(pos, self.prv[pos])]
            who = who[:len(pos)]
        right, w = self.nxt[pos], self.weight[pos]
        for beside in right, self.prv[pos]:    # the pairs around lose their occurrences
            p = self.pid[beside]
            np.subtract.at(self.count, p[p >= 0], w[p >= 0])
            self.pid[beside] = -1
        self.count[pairs], self.pid[pos] = 0, -1
        after = self.nxt[right]
        self.sym[pos], self.sym[right], self.nxt[pos], self.prv[after] = base + who, -1, after, pos
        left = self.prv[pos]
        return self.store(np.concatenate([left[(self.sym[left] >= 0) & (self.sym[left] < base)], pos]))   # each position once

def learn_merges(text, lens, counts, n_merges, add=lambda n: None):
    """Distinct words, end to end, and how often each occurs -> up to n_merges pairs (left id, right id), most frequent first.

    Many merges at a time. Let p1, p2, ... be the pairs in order (count falling, then key rising). Merging p1 = (a, b) takes away pairs
    (x, a) and (b, y) only, and no old count ever rises, so p2 = (l, r) keeps its count and place if l != b and r != a. A new
    pair (x, ab) or (ab, y) is at most as frequent as the old (x, a) or (b, y) and has a larger key; so if it came before p2, the old one would
    too, and the old one touches p1. Hence: walk down the order, stop at the first pair that touches an earlier one, l == b or r == a, or
    that is (a, a), which overlaps itself and goes alone; what is passed is exactly what one merge at a time would take.
    """
    pairs = Pairs(text, lens, counts)
    merges, hot, window = [], np.zeros(0, np.int64), 16
    least = last = 0    # hot holds the pairs with more than `least` occurrences, or as many and a key up to `last`
    while len(merges) < n_merges:
        count, key = pairs.count, pairs.key
        c = count[hot]
        keep = (c > least) | ((c == least) & (key[hot] <= last))
        hot, c = hot[keep], c[keep]
        if not len(hot):    # take the next few thousand
            c = count[:pairs.n]
            least = max(1, int(np.partition(c, -HOT)[-HOT])) if len(c) > HOT else 1
            ties = np.flatnonzero(c == least)
            ties = ties[np.argsort(key[ties])][:HOT]
            hot = np.concatenate([np.flatnonzero(c > least), ties])
            if not len(hot):
                break       # every word is one token
            last, c = int(key[ties[-1]]) if len(ties) else -1, count[hot]
        top = hot if len(hot) <= window else hot[c >= np.partition(c, -window)[-window]]
        top = top[np.lexsort((key[top], -count[top]))][:min(window, n_merges - len(merges))]
        batch, a, b = [], set(), set()
        for l, r in zip((key[top] >> 32).tolist(), (key[top] & 0xFFFFFFFF).tolist()):
            if l in b or r in a or (l == r and batch):
                break
            batch.append((l, r))
            a.add(l), b.add(r)
            if l == r:
                break
        top, window = top[:len(batch)], 2 * len(batch) + 8
        merges += batch
        add(len(batch))
        new = pairs.merge(top, *pairs.positions(top), 256 + len(merges) - len(batch))
        hot = np.concatenate([hot, new[pairs.count[new] >= least]])
    return merges

def ranks(table, left, right):
    """Rank of the merge (left, right) in a Table of merges' keys, NONE where there is none."""
    rank = table.find((left.astype(np.int64) << 32 | right).view(U))
    rank[(rank < 0) | (right < 0)] = NONE
    return rank

def merge_words(table, text, lens, limit, merge_one):
    """Words end to end -> (their tokens end to end, number of tokens of each). All words go in step: each round merges in every word
    the pair learned first, so there are as many rounds as the busiest word has merges. Words over `limit` bytes go to merge_one."""
    hard = np.flatnonzero(lens > limit)
    tokens = [merge_one(text[i:i + n].tobytes()) for i, n in zip((np.cumsum(lens) - lens)[hard], lens[hard])]
    tokens, owners = [np.array(list(itertools.chain(*tokens)), np.int32)], [np.repeat(hard, np.array(list(map(len, tokens)), int))]
    owner = np.repeat(np.arange(len(lens)), lens)
    easy = lens[owner] <= limit
    sym, word = np.append(text[easy].astype(np.int32), -1), np.append(owner[easy], -1)   # -1 closes the last word
    rank = np.append(np.where(word[1:] == word[:-1], ranks(table, sym[:-1], sym[1:]), NONE), NONE)
    while len(sym) > 1:
        start = runs(word)
        best, size = np.minimum.reduceat(rank, start), np.diff(start, append=len(word))
        best[-1] = 0
        done = np.repeat(best == NONE, size)
        tokens.append(sym[done])
        owners.append(word[done])
        hit = np.flatnonzero((rank == np.repeat(best, size)) & ~done)
        hit = hit[every_other(hit, hit - 1)]
        sym[hit] = 256 + rank[hit]
        keep = ~done
        keep[hit + 1] = False
        hit = (np.cumsum(keep) - 1)[hit]
        sym, word, rank = sym[keep], word[keep], rank[keep]
        hit = np.concatenate([hit, hit[hit > 0] - 1])
        rank[hit] = np.where(word[hit] == word[hit + 1], ranks(table, sym[hit], sym[hit + 1]), NONE)
    owners = np.concatenate(owners)
    return np.concatenate(tokens)[np.argsort(owners, kind="stable")], np.bincount(owners, minlength=len(lens))

# ---- The tokenizer --------------------------------------------------------------------------------------------------------------

class Tokenizer:
    """256 bytes, merges in the order learned, special tokens. Not thread-safe (encode keeps a cache); pickles.

    merges: list of (left id, right id). special_tokens: dict text -> id. ids: the id of every byte and then of every merge, None for
    0, 1, 2, ... vocab_size: the number of ids a model needs, special tokens included. normalizer: None, or "NFC", which encoding applies
    to the text first. hash: identifies all these and the pattern. A vocabulary made otherwise than by merging (Llama 3's, in part) has
    tokens to which those before them do not lead: their "merge" is the three or more parts where that ends, and tiktoken's engine encodes.
    """

    def __init__(self, merges, pattern=GPT2_SPLIT, special_tokens=(), ids=None, normalizer=None):
        n, pattern = 256 + len(merges), SAME_SPLIT.get(pattern, pattern)
        number = np.arange(n) if ids is None else np.array(ids, np.int64)
        if not isinstance(special_tokens, dict):
            special_tokens = {t: int(number.max()) + 1 + i for i, t in enumerate(dict.fromkeys(special_tokens))}
        if pattern not in (GPT2_SPLIT, GPT4_SPLIT, CL100K_SPLIT, QWEN_SPLIT) or normalizer not in (None, "NFC"):
            raise ValueError(f"split pattern {pattern!r} with normalizer {normalizer!r} is not supported: use GPT2_SPLIT or GPT4_SPLIT of bpe.py")
        inside = dict(zip(number.tolist(), range(n)))
        pairs = [tuple(inside.get(part, n) for part in m) for m in merges]
        if any(len(p) < 2 or max(p) >= 256 + i for i, p in enumerate(pairs)) or len(set(pairs)) < len(pairs):
            raise ValueError("damaged merges: each must be a new pair of ids that are bytes or earlier merges")
        taken = {*inside, *special_tokens.values()}
        if len(number) != n or len(taken) != n + len(special_tokens) or min(taken) < 0 or "" in special_tokens:
            raise ValueError("every byte, merge and special token needs an id of its own, and a special token must not be empty")
        self.pattern, self.normalizer, self.special_tokens, self.vocab_size = pattern, normalizer, special_tokens, max(taken) + 1
        self.merges, self.ids = [tuple(m) for m in merges], None if (number == np.arange(n)).all() else number.tolist()
        self._number = number.astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._table, self._limit = Table(np.array([p[0] << 32 | p[1] for p in pairs], U)), LONG if all(len(p) == 2 for p in pairs) else 0
        self._forget()

    @classmethod
    def train(cls, docs, vocab_size, pattern=GPT2_SPLIT, special_tokens=(ENDOFTEXT,), workers=None, verbose=False):
        """Learn merges from documents; only the distinct words are held in memory.

        docs: any iterable of str, or bytes, or iterables of parts of one document (a file too large for memory, say). A special token in
        a str or bytes document is no text: it parts it, as the end of a document does.
        vocab_size: the number of ids, bytes and special tokens included; 256 is the plain byte tokenizer, its special tokens on top.
        If the text has too few pairs, the vocabulary is smaller and a line on stderr says so. workers: processes that count; None: one per
        core. verbose: progress on stderr. Raises ValueError for vocab_size < 256 or another pattern, OSError if a worker dies.
        """
        if vocab_size < 256:
            raise ValueError(f"vocab_size is {vocab_size}, too small: the 256 bytes alone need 256")
        plain, show = cls([], pattern, special_tokens), progress if verbose else lambda *a: lambda n: None
        n_merges, merges = max(0, vocab_size - 256 - len(plain.special_tokens)), []
        def pieces():
            for doc in [docs] if isinstance(docs, (str, bytes)) else docs:
                parts = [[t] for t in plain._parts(doc, plain.special_tokens)[::2]] if isinstance(doc, (str, bytes)) else [doc]
                for part in parts:
                    yield from cut(part, plain.pattern)
        if n_merges:
            words = count_parallel(pieces(), plain.pattern, workers or os.cpu_count(), show("counting"))
            merges = learn_merges(*words, n_merges, show("merging", n_merges, 1, "merges"))
        if len(merges) < n_merges:
            print(f"bpe.py: the text has only {len(merges)} pairs to merge, so vocab_size is {vocab_size - n_merges + len(merges)}, "
                  f"not {vocab_size}", file=sys.stderr)
        return cls(merges, pattern, special_tokens)

    @functools.cached_property
    def _engine(self):
        import tiktoken
        return tiktoken.Encoding("words", pat_str=GPT2_SPLIT, special_tokens={},
                                 mergeable_ranks={self.vocab[j]: i for i, j in enumerate(self._number.tolist())})

    def _forget(self):
        self._words, self._tokens, self._end = Table(), np.zeros(0, self._number.dtype), np.zeros(1, np.int64)

    def _encode(self, pieces):
        """Pieces of text -> an array of ids for each, in order. The new words of several chunks are merged together."""
        for batch in groups(pieces, 8 * CHUNK):
            if self._words.n > CACHE or len(self._tokens) > 8 * CACHE:
                self._forget()
            chunks = []
            for group in groups(batch, CHUNK):
                *words, ends = split(group, self.pattern)
                chunks.append((self._words.words(*words), ends))
            tokens, size = merge_words(self._table, *self._words.new(), self._limit, lambda word: self._engine._encode_single_piece(word))
            self._tokens = np.append(self._tokens, self._number[tokens])
            self._end = np.append(self._end, self._end[-1] + np.cumsum(size))
            for number, ends in chunks:
                size = self._end[number + 1] - self._end[number]
                ids = gather(self._tokens, self._end[number], size)
                yield from np.split(ids, np.append(0, np.cumsum(size))[ends[:-1]])

    def _parts(self, text, special):
        """[ordinary, special token, ordinary, ...] as bytes."""
        tokens, text = sorted(map(as_bytes, special), key=len, reverse=True), as_bytes(text)
        return re.split(b"(" + b"|".join(map(re.escape, tokens)) + b")", text) if any(t in text for t in tokens) else [text]

    def encode(self, text, allowed_special=()):
        """str or bytes -> list of ids. Special tokens named in allowed_special ("all" for all) get their id; the rest, by default all, is
        ordinary text."""
        allowed = self.special_tokens if allowed_special == "all" else allowed_special
        if unknown := [name for name in allowed if name not in self.special_tokens]:
            raise ValueError(f"allowed_special has {unknown[0]!r}, which is none of this tokenizer's: {list(self.special_tokens)}")
        parts = self._parts(text, allowed)
        parts[::2] = [ids.tolist() for ids in self.encode_batch(parts[::2])]
        parts[1::2] = [[self.special_tokens[name.decode()]] for name in parts[1::2]]
        return list(itertools.chain(*parts))

    def encode_batch(self, texts):
        """Any iterable of str or bytes -> list of arrays of ids, uint16 where the vocabulary fits, else uint32. No special tokens."""
        sizes = []
        def pieces():
            for text in texts:
                sizes.append(0)
                for piece in cut([text], self.pattern, self.normalizer):
                    sizes[-1] += 1
                    yield piece
        arrays = iter(list(self._encode(pieces())))
        return [next(arrays) if n == 1 else np.concatenate(list(itertools.islice(arrays, n))) for n in sizes]

    def encode_iterable(self, lines):
        """Parts of one text (str or bytes; an open file, say) -> its ids one by one, as of the whole text, in bounded memory."""
        for ids in self._encode(cut(lines, self.pattern, self.normalizer)):
            yield from ids.tolist()

    @functools.cached_property
    def vocab(self):
        """dict id -> bytes of every token."""
        vocab = {i: bytes([b]) for b, i in enumerate(self._number[:256].tolist())}
        for parts, i in zip(self.merges, self._number[256:].tolist()):
            vocab[i] = b"".join(map(vocab.get, parts))
        return vocab | {i: as_bytes(t) for t, i in self.special_tokens.items()}

    def decode_bytes(self, ids):
        """ids (any iterable of int) -> bytes. Raises ValueError for an id that is no token."""
        try:
            return b"".join([self.vocab[i] for i in (ids.tolist() if hasattr(ids, "tolist") else ids)])
        except KeyError as e:
            raise ValueError(f"token id {e.args[0]} is not in the vocabulary of {self.vocab_size}") from None

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_stream(self, ids):
        """Yields text as ids arrive, holding back the bytes of a character until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for data, last in itertools.chain(((self.decode_bytes([int(i)]), False) for i in ids), [(b"", True)]):
            if text := decoder.decode(data, last):
                yield text

    # Files. The file's own form is JSON of to_dict(); a checkpoint may carry the dict itself.

    def to_dict(self):
        d = {"pattern": self.pattern, "special_tokens": dict(self.special_tokens), "ids": self.ids, "merges": list(map(list, self.merges))}
        d |= {"normalizer": self.normalizer} if self.normalizer else {}
        return d | {"hash": hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest()}

    @classmethod
    def from_dict(cls, d):
        try:
            tok, said = cls(d["merges"], d["pattern"], dict(d["special_tokens"]), d["ids"], d.get("normalizer")), d["hash"]
        except (KeyError, TypeError, OverflowError) as e:
            raise ValueError(f"not a tokenizer of bpe.py: {type(e).__name__} {e}") from None
        if tok.hash != said:
            raise ValueError(f"damaged tokenizer: its hash is {tok.hash[:12]}, it says {str(said)[:12]}")
        return tok

    hash = functools.cached_property(lambda self: self.to_dict()["hash"])

    def __reduce__(self):
        return Tokenizer.from_dict, (self.to_dict(),)

    def save(self, path):
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path):
        """Raises ValueError if the file is no tokenizer of this program, or was damaged."""
        return read(path, lambda text: cls.from_dict(json.loads(text)))

    def to_tiktoken(self):
        """-> tiktoken.Encoding with the same vocabulary, pattern and special tokens."""
        import tiktoken
        order = self._number[256:].tolist()
        if order != sorted(order) or self.normalizer:
            raise ValueError("tiktoken merges in the order of ids and does not normalize to NFC: this tokenizer cannot become one of its")
        return tiktoken.Encoding(f"bpe-{self.hash[:8]}", pat_str=self.pattern, special_tokens=self.special_tokens,
                                 mergeable_ranks={self.vocab[i]: i for i in self._number.tolist()})

    @classmethod
    def from_ranks(cls, rank, merges=None, **rest):
        """rank: dict token -> id, merged in the order of ids. What each token was merged from is found again by merging its bytes as far as
        the tokens before it go: two parts are left. If a file lists merges, pairs of tokens, they must be these, or every split of a token."""
        order, found = sorted((t for t in rank if len(t) > 1), key=rank.get), []
        try:
            for token in order:
                parts = [token[i:i + 1] for i in range(len(token))]
                while len(parts) > 2:
                    best, i = min((rank.get(a + b, NONE), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
                    if best >= rank[token]:
                        break
                    parts[i:i + 2] = [parts[i] + parts[i + 1]]
                found.append(tuple(rank[part] for part in parts))
            pairs = found if merges is None else [(rank[a], rank[b]) for a, b in merges]
            made = order if merges is None else [rank[a + b] for a, b in merges]
            ids = [rank[bytes([i])] for i in range(256)] + [rank[t] for t in order]
        except KeyError as e:
            raise ValueError(f"token {e.args[0]!r} is missing: not byte-level BPE, or a damaged file") from None
        if merges and (made != sorted(made) or {*pairs} not in ({*found}, {*splits(rank)})):
            raise ValueError("its merges are not those of its ids, in their order: this cannot be read")
        return cls(found, ids=ids, **rest)

    @classmethod
    def from_tiktoken(cls, source, pattern=GPT2_SPLIT, special_tokens=()):
        """A tiktoken.Encoding, with its own pattern and special tokens, or the path of a rank file (base64 and rank per line)."""
        if hasattr(source, "_mergeable_ranks"):
            return cls.from_ranks(source._mergeable_ranks, pattern=source._pat_str, special_tokens=source._special_tokens)
        return read(source, lambda text: cls.from_ranks({base64.b64decode(t, validate=True): int(r) for t, r in map(
            str.split, text.splitlines())}, pattern=pattern, special_tokens=special_tokens))

    @classmethod
    def gpt2(cls):
        """GPT-2's vocabulary, as tiktoken downloads it or remembers it. Raises ValueError if it can do neither."""
        import tiktoken
        try:
            return cls.from_tiktoken(tiktoken.get_encoding("gpt2"))
        except OSError as e:    # what requests raises is an OSError
            raise ValueError(f"cannot get GPT-2's vocabulary ({type(e).__name__}): connect once, or read its published files with "
                             "Tokenizer.from_gpt2('merges.txt', 'vocab.json'), or train your own") from None

    @classmethod
    def from_gpt2(cls, merges_path, vocab_path=None):
        """GPT-2's published merges.txt (vocab.bpe) and vocab.json (encoder.json); without the latter, numbered as GPT-2 does."""
        def parse(text):
            merges = [line.split(" ") for line in text.split("\n") if line and not line.startswith("#version")]
            tokens = [*LETTERS.values(), *(a + b for a, b in merges), ENDOFTEXT]
            vocab = read(vocab_path, json.loads) if vocab_path else dict(zip(tokens, range(len(tokens))))
            special = {ENDOFTEXT: vocab.pop(ENDOFTEXT)} if ENDOFTEXT in vocab else {}
            return cls.from_ranks({to_bytes(t): i for t, i in vocab.items()}, [tuple(map(to_bytes, m)) for m in merges], special_tokens=special)
        return read(merges_path, parse)

    def to_hf(self, path):
        """Write a Hugging Face tokenizer.json."""
        name = {i: "".join(map(LETTERS.get, self.vocab[i])) for i in self._number.tolist()}
        merges = self.merges if self._limit else splits({self.vocab[i]: i for i in name})
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.pattern == GPT2_SPLIT}
        regex = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        write_json(path, {
            "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": level,
            "added_tokens": [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                             for t, i in self.special_tokens.items()],
            "normalizer": {"type": self.normalizer} if self.normalizer else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [level] if level["use_regex"] else [regex, level]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": not self._limit, "vocab": {t: i for i, t in name.items()},
                      "merges": [[name[a], name[b]] for a, b in merges]}})

    @classmethod
    def from_hf(cls, path):
        """Read a Hugging Face tokenizer.json: byte-level BPE with a pattern that __init__ takes (GPT-2, Llama 3, Qwen, ...). Added tokens
        become special tokens; what a post-processor adds, such as a first token, is the caller's to add."""
        def parse(text):
            d = json.loads(text)
            model, norm, steps = d["model"], (d.get("normalizer") or {}).get("type"), d.get("pre_tokenizer") or {"type": "missing"}
            steps = steps.get("pretokenizers", [steps])
            cuts = [s["pattern"].get("Regex") for s in steps if s["type"] == "Split" and s["behavior"] == "Isolated" and not s["invert"]]
            cuts += [GPT2_SPLIT for s in steps if s["type"] == "ByteLevel" and s.get("use_regex", True)]
            wrong = [f"its {what} is {is_!r}" for what, is_, ok in [
                ("model", model.get("type", "BPE"), "BPE"), ("normalizer", norm, norm if norm == "NFC" else None),
                ("byte_fallback (SentencePiece's)", model.get("byte_fallback", False), False),
                *[("pre-tokenizer", s["type"], s["type"] if s["type"] == "Split" else "ByteLevel") for s in steps],
                *[("prefix space", s["add_prefix_space"], False) for s in steps if "add_prefix_space" in s],
                *[(key, model.get(key) or None, None) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")],
                ("number of split patterns", len(cuts), 1), ("last pre-tokenizer", steps[-1]["type"], "ByteLevel")] if is_ != ok]
            if wrong:
                raise ValueError(f"{', '.join(wrong)}: only byte-level BPE with one split pattern, and NFC or no normalizer, can be read")
            special = {t["content"]: t["id"] for t in d.get("added_tokens", [])}
            rank = {to_bytes(t): i for t, i in model["vocab"].items() if t not in special}
            merges = [tuple(map(to_bytes, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
            tok = cls.from_ranks(rank, merges, pattern=cuts[0], special_tokens=special, normalizer=norm)
            if not tok._limit and not model.get("ignore_merges"):
                raise ValueError("it has tokens that merging does not lead to, but no ignore_merges")
            return tok
        return read(path, parse)

SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]    # the printable character GPT-2's files write for each byte, in its order
LETTERS = {b: chr(b) for b in SHOWN} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in SHOWN)}
BYTES = {letter: b for b, letter in LETTERS.items()}

def to_bytes(letters):
    return bytes(map(BYTES.__getitem__, letters))

def splits(vocab):
    """dict token -> id: every two tokens that make a third, (left id, right id) -> id of the third, in the order of the thirds."""
    return {(vocab[t[:i]], vocab[t[i:]]): vocab[t] for t in sorted(vocab, key=vocab.get) for i in range(1, len(t))
            if t[:i] in vocab and t[i:] in vocab}

def read(path, parse):
    """parse(the text of the file); what is wrong with it becomes a ValueError that names the file."""
    try:
        with open(path, encoding="utf-8") as f:
            return parse(f.read())
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"cannot read {path}: {e if isinstance(e, ValueError) else f'{type(e).__name__} {e}'}") from None

def write_json(path, d):
    """Atomic: the whole file or none."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(json.dumps(d, separators=(",", ":"), ensure_ascii=False))
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)

# ---- Command line ---------------------------------------------------------------------------------------------------------------

def progress(label, total=0, scale=1e6, unit="MB"):
    """add(n), which keeps a line on stderr: how far, how fast, how long still (in a log file: a line every 10 seconds)."""
    done, start, shown, tty = 0, time.time(), time.time(), sys.stderr.isatty()
    def add(n):
        nonlocal done, shown
        done, now = done + n, time.time()
        if tty and 0 < total <= done:
            print(end="\x1b[K", file=sys.stderr, flush=True)
        elif now - shown >= (0.2 if tty else 10):
            rate, shown = max(done, 1) / (now - start), now
            left = f" of {total / scale:,.0f}, {max(total - done, 0) / rate:,.0f} s left" if total else ""
            print(f"{label}: {done / scale:,.0f} {unit}{left}, {rate / scale:,.1f} {unit}/s",
                  end="\x1b[K\r" if tty else "\n", file=sys.stderr, flush=True)
    return add

def main(argv=None):
    import argparse
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on files, each one document.")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--vocab_size", type=int, default=4096, help="number of ids, bytes and special tokens included")
    parser.add_argument("--out", default="tok.json", help="file to write")
    parser.add_argument("--pattern", default="gpt2", choices=["gpt2", "gpt4"], help="how text is split into words")
    parser.add_argument("--special", default=ENDOFTEXT, help="special tokens, separated by commas")
    parser.add_argument("--workers", type=int, help="processes that count words (default: one per core)")
    a = parser.parse_args(argv)
    try:
        began, total = time.time(), sum(map(os.path.getsize, a.files))
        if not total or not os.path.isdir(os.path.dirname(a.out) or "."):
            raise ValueError(f"{', '.join(a.files)}: no text" if not total else f"--out={a.out}: its folder does not exist")
        docs = (iter(lambda f=f: f.read(CHUNK), b"") for f in map(lambda path: open(path, "rb"), a.files))
        pattern, special = GPT2_SPLIT if a.pattern == "gpt2" else GPT4_SPLIT, [s for s in a.special.split(",") if s]
        tok = Tokenizer.train(docs, a.vocab_size, pattern, special, a.workers, verbose=True)
        tok.save(a.out)
        with open(a.files[0], "rb") as f:
            sample = f.read(1 << 20)
        print(f"{a.out}: {len(tok.merges):,} merges, vocab_size {tok.vocab_size:,}; {total / 1e6:.1f} MB in {time.time() - began:.2f} s; "
              f"{len(sample) / max(1, len(tok.encode_batch([sample])[0])):.2f} bytes per token")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted, nothing written")

if __name__ == "__main__":
    main()
