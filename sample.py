"""
Text from a trained GPT: everything between a checkpoint and the characters on the screen.

    python sample.py                                                # the newest run in out/, one sample, streamed
    python sample.py --start="def main" --num_samples=3 --stop='\n\n' --temperature=0.7 --top_p=0.9
    python sample.py --prompts=prompts.txt --logprobs > out.jsonl    # prompts of any lengths in one batch
    python sample.py --num_beams=4 --temperature=0                  # beam search; --best_of=8 draws eight and keeps the likeliest
    python sample.py --quantize=int8 --speculate=6                  # faster: 8-bit weights, drafts looked up; --compile for long runs
    python sample.py --interactive                                  # a conversation that stays in the cache
    python sample.py --init_from=gpt2 --start="The"                 # OpenAI's weights, or a Hugging Face folder's: Llama 3, Qwen3
    python sample.py --export=FOLDER                                # no sample: the model as a folder that transformers loads

Row i of a batch draws with seed + i and nothing else: `--seed=<seed + i>` alone gives the same text, with speculation or without.

    attention sinks, rolling cache     Xiao et al. 2023, arXiv:2309.17453
    speculation by prompt look-up      Leviathan et al. 2022, arXiv:2211.17192; Saxena 2023, prompt-lookup-decoding
    repetition penalty                 Keskar et al. 2019, arXiv:1909.05858
    int8, one scale per output row     Dettmers et al. 2022, arXiv:2208.07339, weights only

Notation: R rows alive, T tokens fed to each in a step, V the ids that may be drawn, the rest as in model.py.
"""
import base64, codecs, copy, dataclasses, glob, json, math, os, re, shutil, sys, time
from collections import Counter

import torch
import torch.nn as nn
from torch.nn import functional as F

import bpe, config
from config import GPTConfig
from model import GPT, KVCache, apply_rope, filter_logits, hf_config, load_checkpoint, load_hf, pick_device, save_hf

ENDOFTEXT, BEGIN = "<|endoftext|>", "<|begin_of_text|>"             # Llama 3 wants every text to begin with the latter
ENDS = (ENDOFTEXT, "<|end_of_text|>", "<|eot_id|>", "<|im_end|>")   # ours and GPT-2's, Llama 3's, and that of its and of Qwen's answers

# ---------------------------------------------------------------------------- weights

class Int8Linear(nn.Module):
    """
    A linear layer whose weight is int8 (out, in) with a scale per output row, y = (x W8^T) * scale + bias: each weight is off by at
    most scale / 2. The scales are bfloat16 numbers before anything is rounded to them, so both paths below mean the same matrix.
    """
    def __init__(self, linear):
        super().__init__()
        w = linear.weight.detach().float()
        scale = (w.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
        self.register_buffer("weight", (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias, self.bytes = linear.bias, self.weight.nbytes

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and rows <= 4:      # for more rows a real matrix product is faster
            y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.weight, self.scale).view(*x.shape[:-1], -1)
        else: y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """A linear layer on a CPU with its weight in oneDNN's blocked layout, which streams through memory faster than F.linear's."""
    def __init__(self, linear):
        super().__init__()
        self.weight, self.bytes = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), linear.weight.nbytes
        self.bias = linear.bias

    def forward(self, x): return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def replace_linear(module, kind):
    """Every nn.Linear below `module` becomes kind(linear); embeddings stay, they are only looked up."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear): setattr(module, name, kind(child))
        else: replace_linear(child, kind)


def place(model, device, dtype, quantize="none", pack=False):
    """The model ready to sample: weights rounded and on the device; the tables of positions stay float32."""
    if quantize == "int8": replace_linear(model, Int8Linear)
    for p in model.parameters(): p.data = p.data.to(dtype)
    model.to(device).requires_grad_(False).eval()
    onednn = device.type == "cpu" and dtype != torch.float16 and torch.backends.mkldnn.is_available()
    if pack and onednn: replace_linear(model, PackedLinear)
    return model


def find_checkpoint(cfg):
    """best.pt or else ckpt.pt of out_dir; without an out_dir of the newest run in out/."""
    found = [p for folder in ([cfg.out_dir] if cfg.out_dir else glob.glob(os.path.join("out", "*")))
             for p in (os.path.join(folder, "best.pt"), os.path.join(folder, "ckpt.pt")) if os.path.isfile(p)]
    if not found: raise ValueError(f"no checkpoint in {cfg.out_dir or 'out/*'}: train one first: python train.py config/stdlib.py")
    newest = os.path.dirname(max(found, key=os.path.getmtime))
    return next(p for p in found if os.path.dirname(p) == newest)


def read(cfg, device, dtype):
    """(model, tokenizer, its path) of out_dir or the newest run; with init_from and no out_dir of that Hugging Face folder, in dtype at once."""
    hf = not cfg.out_dir and cfg.init_from not in ("scratch", "resume")
    if hf:
        import prepare      # for downloads
        path = prepare.pretrained(cfg.init_from)
        shape, tok = dataclasses.asdict(hf_config(path)[1]), prepare.read_tokenizer(os.path.join(path, "tokenizer.json"))
    else:
        path = find_checkpoint(cfg)
        checkpoint = load_checkpoint(path)
        tok, shape = checkpoint.get("tokenizer"), checkpoint.get("config", {})
        if not tok: raise ValueError(f"{path} holds no tokenizer, so its ids cannot become text: train again with train.py")
        tok = bpe.Tokenizer.gpt2() if tok == "gpt2" else bpe.Tokenizer.from_dict(tok)
    if cfg.rope_scaling != "none":
        trained = shape.get("rope_trained") or shape["block_size"] / shape.get("rope_factor", 1)
        shape |= dict(rope_scaling=cfg.rope_scaling, rope_factor=cfg.rope_factor, rope_trained=0, block_size=int(trained * cfg.rope_factor))
    model = load_hf(path, device, dtype, GPTConfig(**shape)) if hf else GPT.from_checkpoint(checkpoint, path)
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(f"{path}: a tokenizer of {tok.vocab_size} tokens, a model of {model.config.vocab_size}: not from one run")
    return model, tok, path


def export(cfg):
    """Write cfg.export, a folder for transformers' AutoModelForCausalLM and AutoTokenizer, whole or not at all."""
    folder, dtype = os.path.normpath(cfg.export), torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    if os.path.exists(folder): raise ValueError(f"--export={folder} exists: delete it or choose another folder")
    model, tok, path = read(cfg, torch.device("cpu"), dtype)
    work, end = folder + ".partial", next((t for t in ENDS if t in tok.special_tokens), None)
    begin = BEGIN if BEGIN in tok.special_tokens else end
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    try:
        family = save_hf(model, work, dtype, tok.special_tokens.get(begin), tok.special_tokens.get(end))
        tok.to_hf(os.path.join(work, "tokenizer.json"))
        with open(os.path.join(work, "tokenizer_config.json"), "w", encoding="utf-8") as f:
            json.dump(dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=begin, eos_token=end, model_max_length=model.config.block_size,
                           clean_up_tokenization_spaces=False), f, indent=1)
        os.rename(work, folder)
    finally: shutil.rmtree(work, ignore_errors=True)
    print(f"{path} -> {folder}: {family}, {model.num_params():,} parameters, {str(dtype)[6:]}, {tok.vocab_size:,} tokens")


def load(cfg):
    """(model, tokenizer, a line about them) as the config wants them: device, dtype, int8, a longer context."""
    device = pick_device(cfg.device)
    small = device.type != "cpu" or cfg.quantize == "int8"      # the CPU's int8 kernel multiplies with bfloat16
    dtype = getattr(torch, cfg.dtype) if cfg.dtype != "auto" else torch.bfloat16 if small else torch.float32
    model, tok, path = read(cfg, device, dtype)
    about = f"{path} | {model.num_params():,} parameters | {device}, {str(dtype)[6:]}{', int8 weights' * (cfg.quantize == 'int8')}"
    return place(model, device, dtype, cfg.quantize, pack=not cfg.compile), tok, about


def new_cache(model, rows, length):
    weight = model.transformer.wte.weight
    return KVCache(model.config, rows, min(length, model.config.block_size), weight.device, weight.dtype)

# ---------------------------------------------------------------------------- one continuation

class Row:
    """One continuation: its prompt and seed, what was drawn so far, the text that is safe to show; `finish` says why it ended."""
    def __init__(self, prompt, seed, tok, cfg, ends=(), stops=(), fresh=None):
        self.prompt, self.fresh, self.seed, self.tok, self.ends, self.stops = prompt, fresh or prompt, seed, tok, ends, stops
        self.limit, self.tokens, self.logprobs, self.finish = cfg.max_new_tokens, [], [], None
        self.length = 0             # positions of the cache that hold its text: all but the last token, less what was forgotten
        self.raw, self.shown, self.text, self.utf8 = b"", 0, "", codecs.getincrementaldecoder("utf-8")("replace")
        self.uniform = torch.rand(self.limit + cfg.speculate + 1, generator=torch.Generator().manual_seed(seed)).tolist()
        self.indexed, self.index = 2, {}

    def add(self, token, logprob):
        """Take one token. A stop string ends the row where it begins, even if it began tokens ago."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.ends: self.finish = "end"
        else:
            old, self.raw = len(self.raw), self.raw + self.tok.decode_bytes([token])
            found = [at for s in self.stops if (at := self.raw.find(s, max(old - len(s) + 1, 0))) >= 0]
            if found: self.raw, self.finish = self.raw[:min(found)], "stop"
            elif len(self.tokens) == self.limit: self.finish = "length"
        # subtle: hold back what may yet turn out to begin a stop string, and (the decoder does) what may yet become a character
        hold = 0 if self.finish else max((n for s in self.stops for n in range(1, len(s)) if self.raw.endswith(s[:n])), default=0)
        safe = max(len(self.raw) - hold, self.shown)
        self.text, self.shown = self.text + self.utf8.decode(self.raw[self.shown:safe], bool(self.finish)), safe

    def score(self, penalty):
        """Wu et al. 2016, arXiv:1609.08144, in its simple form."""
        return sum(self.logprobs) / max(len(self.tokens), 1) ** penalty

    def draft(self, n):
        """Up to n tokens: those that followed the latest earlier place where the same two tokens stood that end the text now."""
        text, found = self.prompt + self.tokens, None
        for end in range(self.indexed, len(text) + 1):      # the last turn of the loop looks up the end before it is entered
            key = text[end - 2], text[end - 1]
            found, self.index[key] = self.index.get(key), end
        self.indexed = max(len(text), 2)
        return text[found:found + n] if found else []

# ---------------------------------------------------------------------------- drawing

def draw(logits, u, cfg):
    """
    One token a row, (N,), from logits (N, V): the filtered softmax's distribution function inverted at u (N,) in [0, 1), or argmax
    at temperature 0. One number a token, so a row's draws depend on its own seed and logits alone.
    """
    if cfg.temperature == 0: return logits.argmax(-1)
    top = None
    if 0 < cfg.top_k < logits.shape[-1]: logits, top = logits.topk(cfg.top_k)       # from here on k columns, not V
    cdf = filter_logits(logits, cfg.temperature, 0, cfg.top_p, cfg.min_p).softmax(-1).cumsum(-1)
    i = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)     # right: never one of p = 0
    return (i if top is None else top.gather(1, i))[:, 0]


def penalise(logits, seen, penalty):
    """Tokens that the text has, seen (N, V) bool: positive logits divided by the penalty, negative multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def seen_tokens(texts, V, device):
    seen = torch.zeros(len(texts), V, dtype=torch.bool)
    for row, text in zip(seen, texts): row[[t for t in text if t < V]] = True
    return seen.to(device)

# ---------------------------------------------------------------------------- the cache

def prefill(model, prompts, cache, chunk):
    """
    Feed prompts (lists of ids, of any lengths) behind what the rows of a cache of equal lengths hold, `chunk` positions at a time;
    logits (B, V) after the last token of each. Short rows are padded on the right: causal, so no token ever sees the padding.
    """
    past, device, hidden = cache.end, cache.k.device, None
    idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
    last = torch.tensor([len(p) - 1 for p in prompts], device=device)
    for at in range(0, idx.shape[1], chunk):
        x = model.hidden(idx[:, at:at + chunk], cache)                                  # (B, <= chunk, C)
        here = x[torch.arange(len(x)), (last - at).clamp(0, x.shape[1] - 1)]            # (B, C)
        hidden = here if hidden is None else torch.where((last >= at)[:, None], here, hidden)
    cache.set_lengths([past + len(p) for p in prompts])
    return model.head(hidden)


def make_room(model, cache, row, length, text, sinks, need=1):
    """
    Free at least `need` positions of one row and return its new length; text: the ids it was fed. RoPE: drop the oldest after the
    first `sinks` and turn the keys behind them back by as many positions. Other positions: read the sinks and the newer half again.
    """
    size, keep = cache.max_len, min(sinks, cache.max_len // 2 - 1)
    drop = max(need, (size - keep) // 8 if model.config.pos == "rope" else size // 2)      # many at once: no cost per token
    if keep + drop >= length: raise ValueError(f"{need} more tokens do not fit block_size={size}: give shorter text")
    if model.config.pos == "rope":
        cos, sin = model.table0[drop], model.table1[drop]   # (D/2)
        norm = (cos.square() + sin.square()).sqrt()         # YaRN's tables are scaled, a rotation must not be
        k, v = (store[:, row, :, keep + drop:length].clone() for store in (cache.k, cache.v))       # (n_layer, K, kept, D)
        new, k = keep, apply_rope(k.float(), cos / norm, -sin / norm)
    else:
        text, fresh = text[:keep] + text[keep + drop - length:], new_cache(model, 1, length - drop)
        model.hidden(torch.tensor([text], device=cache.k.device), fresh)
        new, k, v = 0, fresh.k[:, 0], fresh.v[:, 0]
    cache.k[:, row, :, new:length - drop], cache.v[:, row, :, new:length - drop] = k.to(cache.k.dtype), v
    return length - drop

# ---------------------------------------------------------------------------- decoding

def compiled_step(model, cache):
    """(R, T) ids -> logits (R, T, V) by torch.compile; on a GPU replayed as a CUDA graph, as the cache stays where it is."""
    for t in (cache.k, cache.v, cache.lengths): torch._dynamo.mark_static_address(t)
    return torch.compile(lambda idx, cache: model.head(model.hidden(idx, cache)), dynamic=False,
                         mode="reduce-overhead" if cache.k.device.type == "cuda" else None)


@torch.inference_mode()
def decode(model, rows, cfg, limit, stats, cache=None, static=False):
    """
    Continue rows (Row objects) together until every one has finished; yields after every step. Only ids below `limit` are drawn.
    Equal prompts are read once. A row that ends leaves the batch. A given cache holds one row, whose `fresh` tokens go behind it.
    stats: a Counter of tokens, seconds, steps and bytes read, those of the prompts apart. static: compile, with shapes that stay.
    """
    device, clock = model.transformer.wte.weight.device, time.perf_counter()
    texts = list(dict.fromkeys(tuple(r.fresh) for r in rows))
    if cache is None: cache = new_cache(model, len(texts), max(map(len, texts)) + cfg.max_new_tokens)
    for row in rows: row.length = cache.end + len(row.fresh)
    logits = prefill(model, texts, cache, cfg.prefill_chunk)[:, None, :limit]               # (R, 1, V)
    origin = [texts.index(tuple(r.fresh)) for r in rows]
    if origin != list(range(len(texts))):
        cache.reorder(origin)
        logits = logits[origin]
    live, drafts, new, cache.static = list(rows), [[] for _ in rows], None, static
    seen = seen_tokens([r.prompt for r in rows], limit, device) if cfg.repetition_penalty != 1 else None
    step = compiled_step(model, cache) if static else lambda idx, cache: model.head(model.hidden(idx, cache))
    matrices = [m for m in model.modules() if isinstance(m, (nn.Linear, Int8Linear, PackedLinear))]
    weights = sum(m.weight.nbytes if isinstance(m, nn.Linear) else m.bytes for m in matrices)
    while True:
        R, T = logits.shape[:2]
        raw = logits.float().flatten(0, 1)                  # (R*T, V)
        if seen is not None: logits = penalise(logits, seen[:, None], cfg.repetition_penalty)       # what drafts add is seen already
        u = torch.tensor([r.uniform[len(r.tokens):len(r.tokens) + T] for r in live], device=device)
        picked = draw(logits.flatten(0, 1), u.flatten(), cfg)                                   # (R*T)
        logp = raw.gather(1, picked[:, None])[:, 0] - raw.logsumexp(-1)
        ids, logp, first = picked.view(R, T).tolist(), logp.view(R, T).tolist(), new is None
        for r, row in enumerate(live):
            before = len(row.tokens)
            for j in range(len(drafts[r]) + 1):     # a draft that is what would have been drawn is kept, and its successor with it
                if row.finish: break
                row.add(ids[r][j], logp[r][j])
                if j == len(drafts[r]) or ids[r][j] != drafts[r][j]: break
            if seen is not None: seen[r, row.tokens[before:]] = True
            if not first: row.length += len(row.tokens) - before
            if not first: stats["tokens"] += len(row.tokens) - before
        spent = time.perf_counter() - clock
        stats.update(dict(prompt_seconds=spent, prompt_tokens=sum(map(len, texts))) if first else dict(seconds=spent, steps=1))
        yield
        clock = time.perf_counter()
        keep = [r for r, row in enumerate(live) if not row.finish]
        if not keep: return
        if len(keep) < len(live) and (not static or 2 * len(keep) <= len(live)):    # static: few shapes, each is compiled anew
            live, seen = [live[r] for r in keep], seen if seen is None else seen[keep]
            cache.reorder(keep)
            if static: step = compiled_step(model, cache)
        for r, row in enumerate(live):
            if row.length == cache.max_len:         # a row that has finished and waits for the others just starts over
                row.length = 0 if row.finish else make_room(model, cache, r, row.length, (row.prompt + row.tokens)[:-1], cfg.sinks)
        room = min(cfg.speculate, cache.max_len - max(row.length for row in live) - 1)
        drafts = [row.draft(min(room, row.limit - len(row.tokens) - 1)) if cfg.speculate else [] for row in live]
        T = 1 + (room if static else max(map(len, drafts)))
        new = torch.tensor([row.tokens[-1:] + d + [0] * (T - 1 - len(d)) for row, d in zip(live, drafts)], device=device)
        cache.set_lengths([row.length for row in live])
        stats["bytes"] += weights + 2 * cache.k[:, 0, :, 0].nbytes * sum(row.length + T for row in live)
        logits = step(new, cache)[:, :, :limit]


@torch.inference_mode()
def beam_search(model, row, cfg, limit):
    """
    The num_beams best continuations of one prompt as finished Rows, best first, by log-probability / tokens ** length_penalty. The
    cache is reordered, never recomputed; the search ends when no live beam can overtake the worst of the kept.
    """
    def child(parent, token, logprob):
        row = copy.copy(parent)
        row.tokens, row.logprobs, row.utf8 = parent.tokens[:], parent.logprobs[:], copy.deepcopy(parent.utf8)
        row.add(token, logprob)
        return row
    n, device, beams, done = cfg.num_beams, model.transformer.wte.weight.device, [row], []
    cache = new_cache(model, 1, len(row.prompt) + cfg.max_new_tokens)
    logits = prefill(model, [row.prompt], cache, cfg.prefill_chunk)[:, :limit]
    while True:
        if cfg.repetition_penalty != 1:
            logits = penalise(logits, seen_tokens([b.prompt + b.tokens for b in beams], limit, device), cfg.repetition_penalty)
        logp = logits.float().log_softmax(-1)                                                           # (beams, V)
        total, grown = logp + torch.tensor([[sum(b.logprobs)] for b in beams], device=device), []
        for i in total.flatten().topk(min(2 * n, total.numel())).indices.tolist():      # 2n: even if every beam ends, n go on
            new = child(beams[i // limit], i % limit, logp.flatten()[i].item())
            if new.finish: done.append(new)
            elif len(grown) < n: grown.append((i // limit, new))
        done = sorted(done, key=lambda r: -r.score(cfg.length_penalty))[:n]
        # a live beam's log-probability can only fall: divided by the longest possible length it is the most that beam can hope for
        hope = max((sum(r.logprobs) / cfg.max_new_tokens ** cfg.length_penalty for _, r in grown), default=-math.inf)
        if not grown or len(done) == n and done[-1].score(cfg.length_penalty) >= hope: return done
        cache.reorder([b for b, _ in grown])
        beams = [r for _, r in grown]
        if cache.end == cache.max_len:
            full = cache.max_len
            cache.set_lengths([make_room(model, cache, b, full, (r.prompt + r.tokens)[:-1], cfg.sinks) for b, r in enumerate(beams)])
        logits = model.head(model.hidden(torch.tensor([r.tokens[-1:] for r in beams], device=device), cache)[:, -1])[:, :limit]

# ---------------------------------------------------------------------------- what people type and see

def read_file(path):
    try:
        with open(path, encoding="utf-8") as f: return f.read()
    except FileNotFoundError: raise ValueError(f"no file {path!r}: check the path of the prompt") from None
    except UnicodeDecodeError as e: raise ValueError(f"{path} is not UTF-8 at byte {e.start}: save it as UTF-8") from None


def first_token(tok):
    """[the id that a text begins with], [] if the tokenizer has none."""
    return [tok.special_tokens[t] for t in (BEGIN, ENDOFTEXT) if t in tok.special_tokens][:1]


def read_prompts(cfg, tok, model):
    """(lists of ids, their texts); ValueError for what is empty, missing or too long for the context."""
    texts, size, begin = [cfg.start], model.config.block_size, first_token(tok)
    if cfg.prompts or cfg.start.startswith("FILE:"):
        path = cfg.prompts or cfg.start[5:]
        texts = (read_file(path).split("\n") if cfg.prompts else [read_file(path)]) or [""]
        if cfg.prompts and len(texts) > 1 and not texts[-1]: texts.pop()
        line = f" at line {texts.index('') + 1}" if cfg.prompts and "" in texts else ""
        if not all(texts): raise ValueError(f"{path} is empty{line}: a prompt must have text")
    if not texts[0] and not begin: raise ValueError(f"the tokenizer has no {ENDOFTEXT} to begin with: give a --start")
    prompts = [(begin if BEGIN in tok.special_tokens else []) + tok.encode(t) if t else begin for t in texts]
    longest = max(map(len, prompts))
    if longest > size:
        raise ValueError(f"prompt has {longest} tokens, block_size is {size}: shorten it or train with a larger block_size")
    if cfg.past_context == "error" and longest + cfg.max_new_tokens > size:
        raise ValueError(f"{longest} prompt tokens and max_new_tokens={cfg.max_new_tokens} do not fit block_size={size}: "
                         f"ask for at most {size - longest}, or --past_context=window")
    return prompts, texts


def read_stops(cfg, tok):
    r"""cfg.stop -> (ids that end a row, byte strings that do): "\n\n|<|endoftext|>" -> ({the end-of-text id}, [two line ends])"""
    ends, strings = {tok.special_tokens[t] for t in ENDS if t in tok.special_tokens}, []
    for stop in re.findall(r"(?:^|\|)(<\|.*?\|>|[^|]*)", cfg.stop) if cfg.stop else []:
        if not stop: raise ValueError(f"stop={cfg.stop!r} has an empty part, which would stop every sample at once")
        if stop in tok.special_tokens: ends.add(tok.special_tokens[stop])
        elif re.fullmatch(r"<\|.*\|>", stop):
            raise ValueError(f"stop={stop!r} is no special token of this tokenizer, which has {list(tok.special_tokens)}")
        else: strings.append(stop.replace("\\n", "\n").replace("\\t", "\t").encode())
    return ends, strings


def report(stats, device, compiled, say):
    """Rates of reading and writing, and decoding's memory traffic against what a plain sum over 256 MB reaches here."""
    if not stats["steps"]: return
    x, best = torch.ones(2 ** 26, device=device), math.inf
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    used, peak = stats["bytes"] / stats["seconds"] / 1e9, x.nbytes / best / 1e9
    rate = stats["tokens"] / stats["seconds"]
    say(f"\nprefill {stats['prompt_tokens']:,} tokens at {stats['prompt_tokens'] / stats['prompt_seconds']:,.0f} tok/s | "
        f"decode {stats['tokens']:,} at {rate:,.1f} tok/s, {stats['tokens'] / stats['steps']:.2f} a pass"
        + " (compiling included)" * compiled + f" | weights and cache read at {used:.1f} GB/s, {used / peak:.0%} of the "
        f"{peak:.1f} GB/s that a plain sum reaches")


def interact(model, tok, cfg, limit, ends, stops, say):
    """A conversation: each line typed goes, with its line end, behind what the cache holds, and the model continues."""
    cache, text, turn = new_cache(model, 1, model.config.block_size), [], 0
    pending = first_token(tok)          # in the text, not yet in the cache
    say("each line continues the text; Ctrl-C ends an answer, Ctrl-D the conversation")
    while True:
        try: fresh = pending + tok.encode(input("> ") + "\n")
        except EOFError: return
        need, fed = cache.end + len(fresh) - cache.max_len, text[:len(text) - len(pending)]
        if need > 0:
            if cfg.past_context == "error":
                raise ValueError(f"the conversation has filled block_size={cache.max_len}: use --past_context=window")
            cache.set_lengths([make_room(model, cache, 0, cache.end, fed, cfg.sinks, need)])
        row, shown, turn = Row(fed + fresh, cfg.seed + turn, tok, cfg, ends, stops, fresh), 0, turn + 1
        row.length = cache.end
        try:
            for _ in decode(model, [row], cfg, limit, Counter(), cache):
                print(row.text[shown:], end="", flush=True)
                shown = len(row.text)
        except KeyboardInterrupt: pass
        print()
        cache.set_lengths([row.length])
        text, pending = row.prompt + row.tokens, row.tokens[-1:] or fresh


@torch.inference_mode()
def visualize(model, row, limit, path):
    """Write one self-contained HTML page: every token's probability, its likeliest alternatives, and what each head attended to."""
    c, maps, name = model.config, [], lambda t: row.tok.decode([t])
    ids = (row.prompt + row.tokens)[:min(c.block_size, math.isqrt(2 ** 24 // (c.n_layer * c.n_head)))]      # maps: T*T bytes a head
    def look(attn, args):
        q, k, _ = attn.qkv(*args[:2])                                                           # (1, H, T, D), (1, K, T, D)
        s = q.float() @ k.float().repeat_interleave(c.n_head // c.kv_heads, 1).mT / math.sqrt(c.head_dim)
        s = s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril().triu(1 - (attn.window or len(ids))), -torch.inf)
        maps.append((s.softmax(-1) * 255).round().to(torch.uint8).cpu())
    hooks = [block.attn.register_forward_pre_hook(look) for block in model.transformer.h]
    p = model(torch.tensor([ids], device=model.transformer.wte.weight.device))[0][0, :, :limit].float().softmax(-1).cpu()
    for hook in hooks: hook.remove()
    top = [list(zip(map(name, i), v)) for v, i in zip(*(x.tolist() for x in p.topk(min(8, limit))))]
    tokens = [dict(t=name(t), p=p[i - 1, t].item() if i else None, top=top[i - 1] if i else [], given=i < len(row.prompt))
              for i, t in enumerate(ids)]
    data = dict(tokens=tokens, L=c.n_layer, H=c.n_head, maps=base64.b64encode(torch.cat(maps).numpy().tobytes()).decode())
    with open(path, "w", encoding="utf-8") as f: f.write(PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c")))


PAGE = r"""<!doctype html><meta charset="utf-8"><title>sample.py --visualize</title><style>body{font:15px/1.7 monospace;margin:2em}
#side,#text{white-space:pre-wrap}
#side{position:sticky;top:0;background:#fff;min-height:9em}.given{color:#777}.on{outline:2px solid #c30}</style>
<div id="side"></div><div id="text"></div><script>
const d = DATA, T = d.tokens.length, side = document.getElementById("side");
const maps = Uint8Array.from(atob(d.maps), c => c.charCodeAt(0));
let on = -1, at = {layer: 0, head: 0};
function pick(key, n) { const s = document.createElement("select"); for (let i = 0; i < n; i++) s.add(new Option(i, i));
  s.value = at[key]; s.onchange = () => { at[key] = +s.value; draw(); }; return s; }
const spans = d.tokens.map((k, i) => { const s = document.createElement("span"); s.textContent = k.t;
  s.className = k.given ? "given" : ""; s.onclick = () => { on = on == i ? -1 : i; draw(); };
  document.getElementById("text").append(s); return s; });
function draw() {
  spans.forEach((s, i) => { s.classList.toggle("on", i == on); const p = d.tokens[i].p;
    s.style.background = on < 0 ? `rgba(230,60,30,${p === null ? 0 : Math.min(1, -Math.log(p + 1e-9) / 8) * .8})`
      : `rgba(30,90,230,${i > on ? 0 : maps[((at.layer * d.H + at.head) * T + on) * T + i] / 255})`; });
  const k = d.tokens[on]; side.replaceChildren("layer ", pick("layer", d.L), " head ", pick("head", d.H), on < 0 ?
    "\nred: improbable. Click a token to see its alternatives, and in blue where it looked" : `\n${JSON.stringify(k.t)} p = ${k.p}\n` +
    k.top.map(([t, p]) => `${(100 * p).toFixed(1)}% ${JSON.stringify(t)}`).join("   ")); }
draw();
</script>"""


def main(cfg):
    if cfg.export: return export(cfg)
    model, tok, about = load(cfg)
    device, say = model.transformer.wte.weight.device, lambda *a: print(*a, file=sys.stderr, flush=True)
    limit, stats, (ends, stops) = tok.vocab_size, Counter(), read_stops(cfg, tok)
    prompts, texts = read_prompts(cfg, tok, model)
    if 2 * cfg.sinks >= model.config.block_size:
        raise ValueError(f"sinks={cfg.sinks} must be below half of block_size={model.config.block_size}")
    say(f"{about} | {model.set_backend(training=False)}\n")
    if cfg.interactive: return interact(model, tok, cfg, limit, ends, stops, say)
    beam, draws = cfg.num_beams > 1, 1 if cfg.num_beams > 1 else max(cfg.num_samples, cfg.best_of)
    rows = [Row(p, cfg.seed + i * draws + j, tok, cfg, ends, stops) for i, p in enumerate(prompts) for j in range(draws)]
    as_json, shown, at = bool(cfg.prompts) or cfg.logprobs, 0, 0
    stream = not as_json and not beam and draws == cfg.num_samples
    if stream: print(texts[0], end="", flush=True)
    for i in range(0, len(rows), cfg.batch_size) if not beam else ():
        for _ in decode(model, rows[i:i + cfg.batch_size], cfg, limit, stats, static=bool(cfg.compile)):
            while stream and at < len(rows):        # stream the first row that is not done; those behind it catch up in their turn
                print(rows[at].text[shown:], end="", flush=True)
                shown = len(rows[at].text)
                if not rows[at].finish: break
                at, shown = at + 1, 0
                print("\n---------------\n" + texts[0] if at < len(rows) else "\n", end="", flush=True)
    for i, text in enumerate(texts):
        best = beam_search(model, rows[i], cfg, limit) if beam else rows[i * draws:(i + 1) * draws]
        if draws > cfg.num_samples: best.sort(key=lambda r: -r.score(cfg.length_penalty))
        for j, row in enumerate(best[:cfg.num_samples]):
            data = dict(prompt=text, sample=j, text=row.text, seed=row.seed, tokens=len(row.tokens), finish=row.finish,
                        logprob=sum(row.logprobs))
            if cfg.logprobs: data["token_logprobs"] = [(tok.decode([t]), p) for t, p in zip(row.tokens, row.logprobs)]
            if as_json: print(json.dumps(data, ensure_ascii=False), flush=True)
            elif not stream: print("---------------\n" * (j > 0) + text + row.text, flush=True)
        if cfg.visualize and i == 0: visualize(model, best[0], limit, cfg.visualize)
    report(stats, device, bool(cfg.compile), say)


if __name__ == "__main__":
    config.run(main)
