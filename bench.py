"""
Measures the README's figures of speed, context and evaluation, with peers, where there are any, in the same run.

    python bench.py attention                     # flash_attn.py against every backend of torch's SDPA (on a GPU)
    python bench.py tokenizer [FILE]              # bpe.py against tiktoken, rustbpe and tokenizers, where installed
    python bench.py sample                        # sample.py against no cache and Hugging Face's generate, batch sizes, int8
    python bench.py context --out_dir=out/x       # perplexity of a finished run beyond the context it was trained at
    python bench.py train config/stdlib.py        # step time, tokens/s, MFU: as configured, classic, compiled, attention by SDPA
    python bench.py size config/gpt2_124m.py      # parameters, FLOPs, memory, time and compute-optimal tokens before spending any
    python bench.py plot out/a out/b              # loss of several runs against steps, tokens and seconds (needs matplotlib)
    python bench.py scaling out/a out/b out/c     # a loss law fitted to finished runs, and what it predicts for larger ones
    python bench.py eval --out_dir=out/x --input=FILE --task=hellaswag,FILE.jsonl     # bits per byte of texts; multiple choice

Speeds are ratios: contestants take turns in one run (sample: once each) and the median counts, so a slow machine slows them all.
"""
import contextlib, copy, csv, hashlib, importlib.util, io, itertools, json, math, os, re, statistics, subprocess, sys, sysconfig
import tarfile, tempfile, time, warnings, zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import bpe, config
if "tokenizer" not in sys.argv[1:2]:        # its seconds and memory count from process start: they must not include torch
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    import flash_attn, prepare, sample as sampler, train as trainer
    from model import GPT, hf_config, pick_device, position_table, stretched, why_not_compile

# ---------------------------------------------------------------------------- tools

def table(header, rows):
    """Print rows of strings and numbers in columns wide enough for all of them."""
    show = lambda cell: cell if isinstance(cell, str) else f"{cell:,.2f}" if isinstance(cell, float) else f"{cell:,}"
    text = [header, *(list(map(show, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*text)]
    for row in text: print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))), flush=True)

def plot(path, panels, styles={}, **labels):
    """Plot {title: {line: [(x, y), ..]}}, up to four panels in a row, above one legend. A leading _ keeps a line out of it."""
    from matplotlib.figure import Figure
    rows, columns = math.ceil(len(panels) / 4), min(len(panels), 4)
    figure = Figure(figsize=(5 * columns, 4.5 * rows))
    for axis, (title, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items()):
        for name, points in lines.items(): axis.plot(*zip(*points), label=name, **styles.get(name, dict(marker=".")))
        axis.set(title=title, **labels)
    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.03))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"wrote {path}")

def peer(name):
    """The module, or None after printing how to install it."""
    try: return importlib.import_module(name)
    except ImportError: print(f"{name} is left out: pip install {name}", file=sys.stderr)

def seconds(work):
    """How long work() takes, including what it left running on a GPU (CUDA or MPS)."""
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available(): torch.accelerator.synchronize()
    return time.perf_counter() - start

def take_turns(contestants, rounds, measure=seconds):
    """{name: work} -> {name: median of measure(work)}. Each round runs all of them once, in order. Warm them up first."""
    found = {name: [] for name in contestants}
    for name, work in rounds * list(contestants.items()): found[name].append(measure(work))
    return {name: statistics.median(values) for name, values in found.items()}

def memory_of(work):
    """(what work() returns, its peak GPU memory in MiB beyond what was held before, or "-" without a GPU)"""
    if not torch.cuda.is_available(): return work(), "-"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return work(), (torch.cuda.max_memory_allocated() - before) / 2 ** 20

def read_run(folder):
    """(config.json as a dict, [records of log.jsonl]) of the run in `folder`."""
    try: return json.loads(Path(folder, "config.json").read_text("utf-8")), trainer.read_log(Path(folder, "log.jsonl"))
    except OSError as e: raise ValueError(f"no {e.filename}: give the out_dir of a run, e.g. out/stdlib") from None
    except ValueError as e: raise ValueError(f"{folder}/config.json is damaged: {e}") from None

# ---------------------------------------------------------------------------- attention

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")    # MATH last: it leaves the least memory free
WINDOW = 1024

def attention_case(B, H, K, T, S, D, mask, device, measure):
    """{(pass, peer): (median ms, MiB)} in bf16: forward and backward, or, for one query (T = 1), decoding from a cache. Left out:
    backends that refuse the case or run out of memory. SDPA has no window argument: it gets a mask (T, S)."""
    q, k, v = (torch.randn(B, n, heads, D, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_(T > 1)
               for heads, n in ((H, T), (K, S), (K, S)))
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril().triu(1 - WINDOW) if mask == "window" else None
    lengths, dy, works, mib = torch.full((B,), S, dtype=torch.int32, device=device), torch.randn_like(q), {}, {}

    def attend(name):
        if name == "ours" and T == 1: return flash_attn.flash_decode(q, k, v, lengths)
        if name == "ours": return flash_attn.flash_attention(q, k, v, mask != "full", WINDOW if mask == "window" else 0)
        with sdpa_kernel(getattr(SDPBackend, name)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, is_causal=mask == "causal", enable_gqa=H != K)

    for name in ("ours", *(BACKENDS if T <= 4096 else BACKENDS[:-1])):      # MATH's T x S matrices would take most of the time
        try:
            y, passes = attend(name), {("forward", name): partial(attend, name)}
            if T > 1: passes["backward", name] = partial(torch.autograd.grad, y, (q, k, v), dy, retain_graph=True)
            mib |= {key: memory_of(work)[1] for key, work in passes.items()}
            works |= passes
        except RuntimeError:
            if name == "ours": raise
    return {key: (ms, mib[key]) for key, ms in take_turns(works, 3, measure).items()}

def bench_attention(argv):
    """Tables, attention.csv and a plot. FLOPs are counted as usual: 4*B*H*T*S*D, half if causal, 2.5 times that backward."""
    if argv: raise ValueError(f"attention takes no arguments, not {argv[0]!r}: it always measures the same list of cases")
    if not torch.cuda.is_available() or flash_attn.MISSING: return attention_without_gpu()
    from triton.testing import do_bench
    warnings.simplefilter("ignore")             # torch explains each refusal at length
    # subtle: do_bench puts GPU events around each of many runs, waits for none, and overwrites the L2 cache before each
    measure, rows, plots, device = partial(do_bench, warmup=5, rep=25, return_mode="median"), [], {}, torch.device("cuda")
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    peak = 2 * 8192 ** 3 / take_turns({"product": lambda: a @ b}, 5, measure)["product"] / 1e9
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; matrix product 8192^3: {peak:.0f} TFLOP/s")
    cases = [(16384 // T, 2048 // D, 2048 // D, T, T, D, mask)          # 16k tokens in all, 2048 wide
             for D in (64, 128) for mask in ("causal", "full") for T in (512, 1024, 2048, 4096, 8192, 16384)]
    cases += [(4, 16, 4, 4096, 4096, 128, "causal"), (1, 16, 16, 16384, 16384, 128, "window"),
              (8, 16, 4, 1, 16384, 128, "full"), (1, 16, 4, 1, 65536, 128, "full")]
    header = ["B", "H", "K", "T", "S", "D", "mask", "pass", "peer", "us", "TFLOP/s", "% of peak", "MiB", "time / ours"]
    for B, H, K, T, S, D, mask in cases:
        found = attention_case(B, H, K, T, S, D, mask, device, measure)
        for (which, name), (ms, mib) in found.items():
            keys = {"causal": S / 2, "full": S, "window": WINDOW - WINDOW ** 2 / (2 * S)}[mask]     # a query sees, on average
            flops = 4 * B * H * T * D * keys * (2.5 if which == "backward" else 1)
            rate, ours = flops / ms / 1e9, found[which, "ours"][0]                              # TFLOP/s
            rows.append([B, H, K, T, S, D, mask, which, name, ms * 1e3, rate, 100 * rate / peak, mib, ms / ours])
            if H == K and mask != "window": plots.setdefault(f"{which}, D {D}, {mask}", {}).setdefault(name, []).append((T, rate))
        table(header, rows[-len(found):])
    os.makedirs("out/bench", exist_ok=True)
    with open("out/bench/attention.csv", "w", newline="") as f: csv.writer(f).writerows([header, *rows])
    print("wrote out/bench/attention.csv")
    if peer("matplotlib"): plot("out/bench/attention.png", plots, xscale="log", xlabel="T = S", ylabel="TFLOP/s")

def attention_without_gpu():
    """The memory a layer keeps for its backward pass and, under TRITON_INTERPRET=1, the kernels' error on a small case."""
    print(f"{flash_attn.MISSING or 'no CUDA GPU'}: speed not measured. MiB a layer keeps for its backward pass, without q, k, v "
          "and output; H 12, bf16:")
    for T in (1024, 4096, 16384):
        flash, naive = flash_attn.new_stats(torch.empty(1, 12, T, 64, device="meta")).nbytes, 12 * T * T * 2
        print(f"  T {T:6}: flash {flash / 2 ** 20:8.2f}   naive {naive / 2 ** 20:9.1f}   {naive / flash:7.0f} x")
    qkv, results = torch.randn(3, 1, 2, 150, 64, generator=torch.Generator().manual_seed(0)), []
    if why := flash_attn.why_not(*qkv): return print(f"correctness not measured: {why}")
    for attend, dtype in ((flash_attn.flash_attention, torch.float32), (flash_attn.attention_ref, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in qkv]
        y = attend(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    print("correctness, float32 under the interpreter against float64, largest error over largest value:", *(
        f"{name} {(a - b).abs().max() / b.abs().max():.1e}" for name, a, b in zip(("out", "dq", "dk", "dv"), *results)))

# ---------------------------------------------------------------------------- the tokenizer

def contender(job, name, path, vocab_size, vocab, started):
    """One training or encoding, in a process of its own. Prints seconds, peak MB, tokens and a digest of the result as JSON."""
    module, size, f, ids = importlib.import_module(name), int(vocab_size), open(path, "rb"), []
    if job == "encode":
        ours = bpe.Tokenizer.load(vocab)
        if name == "bpe": encode = lambda text: ours.encode_batch([text])[0]
        elif name == "tiktoken": encode = ours.to_tiktoken().encode_ordinary
        else:
            ours.special_tokens = {}            # their encoder would look for them in the text
            ours.to_hf(vocab + ".hf")
            theirs = module.Tokenizer.from_file(vocab + ".hf").encode_batch_fast
            encode = lambda text: np.concatenate([theirs([piece.decode()])[0].ids for piece in bpe.cut([text])])
        encode("a")                             # warm up: ours builds on first use what tiktoken builds at the start
        text, started = f.read().decode(), time.time()
        ids = encode(text)
    else:
        blocks = iter(lambda: f.read(1 << 20), b"")
        pieces = (piece.decode() for piece in bpe.cut(blocks))      # cut between words: the same words as in the whole file
        if name == "bpe": tok = bpe.Tokenizer.train([blocks], size, special_tokens=())
        elif name == "rustbpe":
            tok = module.Tokenizer()
            tok.train_from_iterator(pieces, size, pattern=bpe.GPT2_SPLIT)
        else:
            tok = module.ByteLevelBPETokenizer()
            tok.train_from_iterator(pieces, size, min_frequency=0, show_progress=False)
    spent = time.time() - float(started)        # of training: from the start of the process, with imports and reading
    if job == "encode": result = [np.asarray(ids, np.uint32).tobytes()]
    elif name == "bpe":
        result = tok.vocab.values()
        tok.save(vocab)
    elif name == "rustbpe": result = [bytes(word) for word, _ in tok.get_mergeable_ranks()]        # in the order of ids
    else: result = []       # Hugging Face breaks ties by its own order of the bytes: test_all.py renumbers, then compares
    digest = hashlib.sha256(b"\0".join(result)).hexdigest() if result else ""
    peak = 0.0
    with contextlib.suppress(ImportError):      # not on Windows
        from resource import RUSAGE_SELF, getrusage
        peak = getrusage(RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)     # macOS counts bytes
    print(json.dumps(dict(seconds=spent, tokens=len(ids), digest=digest, MB=peak)))

def contend(job, name, *words):
    """What a contender process printed. Its peak memory includes its workers', sampled ten times a second, shared pages once."""
    call = [sys.executable, os.path.abspath(__file__), "tokenizer", "contender", job, name, *words, str(time.time())]
    peak, process = 0, subprocess.Popen(call, stdout=subprocess.PIPE)
    while process.poll() is None:
        with contextlib.suppress(OSError, TypeError):           # there is no /proc, or one of the processes has just ended
            kids = [kid for path in Path(f"/proc/{process.pid}/task").glob("*/children") for kid in path.read_text().split()]
            rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (process.pid, *kids)]
            peak = max(peak, sum(int(re.search(r"^Pss:\s*(\d+)", text, re.M)[1]) for text in rollups) / 1024)
        time.sleep(0.1)
    if process.returncode: raise ValueError(f"{name} could not {job}, see above")
    result = json.loads(process.stdout.read())
    return result | {"MB": max(peak, result["MB"])}

def bench_tokenizer(argv):
    """Each run is a process of its own; slow ones run once. --vocab_size; --tokenizer=gpt2 or a bpe.py FILE: encode only."""
    if argv[:1] == ["contender"]: return contender(*argv[1:])
    cfg = config.load(["--vocab_size=32000", *(word for word in argv if word.startswith("--"))])
    with tempfile.TemporaryDirectory() as folder:
        path, *more = [word for word in argv if not word.startswith("--")] or [""]
        config.require(not more and not os.path.isdir(path), f"{' '.join(more) or path}: name one file, and no folder")
        if not path:
            path, sources = f"{folder}/stdlib.txt", sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
            Path(path).write_text("".join(source.read_text("utf-8", "replace") for source in sources), "utf-8")
        size, own, vocab = os.path.getsize(path), cfg.tokenizer == "bpe", f"{folder}/tok.json"
        if not own: (bpe.Tokenizer.gpt2() if cfg.tokenizer == "gpt2" else bpe.Tokenizer.load(cfg.tokenizer)).save(vocab)
        print(f"{path}: {size / 1e6:.1f} MB, median of 3, {bpe.cores()} cores (encoding: one)")
        for job, names in (("train", ("rustbpe", "tokenizers")), ("encode", ("tiktoken", "tokenizers"))):
            if job == "train" and not own: continue
            runs, rows = {name: [] for name in ("bpe", *filter(peer, names))}, []
            for name, done in 3 * list(runs.items()):
                if not done or done[0]["seconds"] <= 30: done.append(contend(job, name, path, str(cfg.vocab_size), vocab))
            for name, done in runs.items():
                spent, tokens, digest = statistics.median(r["seconds"] for r in done), done[0]["tokens"], done[0]["digest"]
                same = "not compared" if not digest else "same" if digest == runs["bpe"][0]["digest"] else "DIFFERENT"
                rows.append([name, spent, size / 1e6 / spent, max(r["MB"] for r in done), size / tokens if tokens else "-", same])
            table([job, "seconds", "MB/s", "peak MB", "bytes/token", "result"], rows)

# ---------------------------------------------------------------------------- sampling

def bench_sample(argv):
    """Decoding speed, with random weights of the config's size (default: GPT-2 124M): recomputing the text for every token, with
    Hugging Face's generate, and with sample.py in float32, bfloat16 and int8 at several batch sizes and prompt lengths. Options:
    --max_new_tokens, --device, --compile (takes minutes: each shape is compiled anew)."""
    files = [] if any(word.endswith(".py") for word in argv) else [f"{config.__path__[0]}/gpt2_124m_classic.py"]
    if any(word.startswith(("--out_dir", "--init_from")) for word in argv):
        raise ValueError("bench.py sample measures random weights of a config's size: leave out --out_dir and --init_from")
    cfg = replace(config.load(files + argv), temperature=1.0, top_k=200, num_beams=1, best_of=1)
    device, tok, rows = pick_device(cfg.device), bpe.Tokenizer([]), []
    tok.decode_bytes = lambda ids: b"."                 # random weights draw random ids, which this tokenizer lacks
    if cfg.block_size < 24: raise ValueError(f"block_size={cfg.block_size} is too short to measure: take at least 24")
    n = min(cfg.max_new_tokens, cfg.block_size - 1)

    def recompute(n):                                   # nanoGPT's way: the whole text through the model for every token
        idx, u = start, torch.full((1,), 0.5, device=device)
        for _ in range(n):
            logits = plain.head(plain.hidden(idx)[:, -1])                               # (1, V)
            idx = torch.cat((idx, sampler.draw(logits, u, cfg)[:, None]), 1)

    def ours(model, batch, prompt, n):                  # -> decoding tokens/s, prefill tokens/s, GB/s read
        if cfg.compile: torch._dynamo.reset()           # each batch size is compiled anew, and recompilations are limited
        c, stats = replace(cfg, max_new_tokens=n), Counter()
        texts = [sampler.Row([i % cfg.vocab_size] * prompt, i, tok, c) for i in range(batch)]
        for step, _ in enumerate(sampler.decode(model, texts, c, cfg.vocab_size, stats)):
            if step == 0: prefill = stats["prompt_tokens"] / stats["prompt_seconds"] if prompt > 1 else "-"
            if step == 3 and n > 8: stats.clear()       # the first steps warm up
        return stats["tokens"] / stats["seconds"], prefill, stats["bytes"] / stats["seconds"] / 1e9

    torch.manual_seed(cfg.seed)
    with device: plain, start = sampler.place(GPT(cfg.model()), device, torch.float32), torch.zeros(1, 1, dtype=torch.long)
    others = {"every token anew, as nanoGPT, float32": recompute}
    if transformers := peer("transformers"):
        shape = dict(n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head)
        shape |= dict(vocab_size=cfg.vocab_size, bos_token_id=0, eos_token_id=None)
        with device: hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
        def generate(hf, n): hf.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=n, min_new_tokens=n,
                                         do_sample=True, top_k=200)
        others |= {f"Hugging Face generate, cached, {str(kind)[6:]}": partial(generate, copy.deepcopy(hf).to(kind))
                   for kind in (torch.float32, torch.bfloat16)}
    for name, work in others.items():
        work(min(n, 17))        # warm up, to a length of 16: Triton compiles another kernel for multiples of 16
        rows.append([name, 1, 1, n, n / seconds(partial(work, n)), "-", "-"])
    for kind, dtype, int8 in (("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False),
                              ("bfloat16, int8 weights", torch.bfloat16, True)):
        model = sampler.place(copy.deepcopy(plain), device, dtype, int8, pack=not cfg.compile)
        ours(model, 1, 16, 8)   # warm up
        for shape in ((1, 1, n), (1, 512, 32), (4, 16, 32), (16, 16, 32), (64, 16, 16)):
            if sum(shape[1:]) <= cfg.block_size: rows.append([f"sample.py, {kind}", *shape, *ours(model, *shape)])
    print(f"\n{plain.num_params():,} parameters, {device}, {torch.get_num_threads()} CPU threads")
    table(["", "batch", "prompt", "new", "tokens/s", "prefill tok/s", "GB/s read", "times the first"],
          [[*row, f"{row[4] / rows[0][4]:.1f} x"] for row in rows])

def bench_context(argv):
    """Perplexity of the last tokens before a length, up to 8 times the context of a run (--out_dir): with each RoPE scaling, and
    with the rolling window, with and without attention sinks. Columns score different text: compare within a column."""
    cfg = config.load([*argv, "--rope_scaling=none", "--rope_factor=1"])
    folder = f"data/{read_run(cfg.out_dir or 'out/<run>')[0]['dataset']}"
    (plain, tok, _), path, rows = sampler.load(cfg), f"{folder}/val.bin", []
    if json.loads(Path(folder, "meta.json").read_text("utf-8"))["tokenizer_hash"] != tok.hash:
        raise ValueError(f"{folder} was prepared again, with another tokenizer than the run's: prepare it as the run did")
    n, trained = plain.config.block_size, round(plain.config.trained_length)
    data, lengths, last = np.memmap(path, dtype="<u2", mode="r"), (n, 2 * n, 4 * n, 8 * n), n // 2
    if n < 2: raise ValueError("block_size=1 is too short to measure: take at least 2")
    if len(data) <= 8 * n: raise ValueError(f"{path} has {len(data):,} tokens: more than 8 times block_size={n} are needed")
    starts = np.linspace(0, len(data) - 8 * n - 1, 24).astype(int)[:, None]
    texts = torch.tensor(data[starts + np.arange(8 * n + 1)].astype(np.int64), device=plain.transformer.wte.weight.device)

    def perplexity(x, length):                          # x (24, >= last, C): the hidden states of tokens up to `length`
        nats = -plain.log_probs(x[:, -last:], texts[:, length - last + 1:length + 1])           # (24,)
        return math.exp(nats.mean().item() / last)

    scaled = copy.deepcopy(plain)                       # the same weights, with other positions
    for kind in ("none", "linear", "ntk", "yarn", "llama3") if plain.config.pos == "rope" else ():
        rows.append(["as trained" if kind == "none" else f"rope_scaling={kind}"])
        for length in lengths:
            scale = dict(rope_scaling=kind, rope_factor=length / trained) if kind != "none" and length > n else {}
            scaled.config = replace(plain.config, block_size=length, rope_trained=trained, **scale)
            scaled.table = position_table(scaled.config).to(texts.device)
            rows[-1].append(perplexity(scaled.hidden(texts[:, :length]), length))
    for sinks in (0, min(4, (n - 1) // 2)):
        cache, kept = sampler.new_cache(plain, len(texts), n), []
        rows.append([f"window, sinks={sinks}"])
        for t in range(lengths[-1]):
            if cache.span == n:
                cache.set_lengths([n - sampler.make_room(plain, cache, r, n, x[:t].tolist(), sinks) for r, x in enumerate(texts)])
            kept = kept[-last + 1:] + [plain.hidden(texts[:, t:t + 1], cache)]
            if t + 1 in lengths: rows[-1].append(perplexity(torch.cat(kept, 1), t + 1))
    table(["perplexity before"] + [f"{length:,} tokens" for length in lengths], rows)

# ---------------------------------------------------------------------------- training

def bench_train(argv):
    """One batch and an optimizer step, as configured and by config/classic.py, compile on and off, our attention and SDPA. MFU is
    the share of the data sheet's FLOP/s, "of product" that of a large matrix product timed in turn with the steps: any device's
    limit."""
    cfg, steps, facts, rows = config.load(argv), {}, {}, []
    recipes = {"classic (GPT-2, AdamW)": config.load([*argv, f"{config.__path__[0]}/classic.py"]), "as configured": cfg}
    machine = trainer.Machine(cfg)
    torch.set_float32_matmul_precision("high")          # as train.py does
    x = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size), device=machine.device)
    n = 8192 if machine.device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=machine.device).to(machine.dtype)

    def contestant(c, compiled, sdpa):                  # -> (its attention, FLOPs a step, the step, warmed up)
        raw = GPT(c.model()).to(machine.device)
        raw.set_backend()
        if sdpa: raw.backend = "sdpa"
        raw.grad_checkpoint = c.grad_checkpoint
        optimizers, model = raw.configure_optimizers(c), torch.compile(raw) if compiled else raw
        def step():
            with machine.autocast: loss = model(x, x)[1]
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), c.grad_clip or math.inf)
            trainer.update(optimizers, ~norm.isfinite())
            raw.zero_grad(set_to_none=True)
        step()
        return raw.backend, raw.estimate_flops() * x.numel(), step

    backends = (True, False) if machine.device.type == "cuda" else (True,)
    if cannot := why_not_compile(machine.device): print(f"compiled steps are left out: {cannot}")
    for recipe, compiled, sdpa in itertools.product(recipes, (False,) if cannot else (False, True), backends):
        (backend, flops, step), mib = memory_of(partial(contestant, recipes[recipe], compiled, sdpa))
        name = f"{recipe}, {backend}" + (", compiled" if compiled else "")
        steps[name], facts[name] = step, (flops, mib)
    print(f"{machine.name}, torch {torch.__version__}, {str(machine.dtype)[6:]}, {x.numel():,} tokens a step")
    times = take_turns(steps | {"product": lambda: a @ b}, 10)
    limit, first = 2 * n ** 3 / times.pop("product"), next(iter(times.values()))
    for name, t in times.items():
        rate, mib = facts[name][0] / t, facts[name][1]
        mfu = f"{rate / machine.peak:.1%}" if machine.peak else "unknown peak"
        rows.append([name, t * 1e3, round(x.numel() / t), rate / 1e12, mfu, f"{rate / limit:.1%}", mib, f"{first / t:.2f} x"])
    print(f"a matrix product of {n} x {n}: {limit / 1e12:.2f} TFLOP/s")
    table(["step", "ms", "tokens/s", "TFLOP/s", "MFU", "of product", "peak MiB", "speed"], rows)

# ---------------------------------------------------------------------------- sizing and seeing runs

def bench_size(argv):
    """Parameters by part, memory by part, FLOPs, hours on GPUs and compute-optimal tokens of a config or of --init_from."""
    if any(word.startswith("--out_dir") for word in argv): raise ValueError("bench.py size wants the run's config, not --out_dir")
    cfg, count = config.load(argv), Counter()
    if folder := prepare.pretrained(cfg.init_from, ["config.json"]):
        theirs = hf_config(folder)[1]
        if cfg.rope_scaling != "none": theirs = stretched(theirs, cfg.rope_scaling, cfg.rope_factor)
        cfg = replace(cfg, **vars(theirs) | dict(block_size=min(theirs.block_size, cfg.block_size)))
    with torch.device("meta"): model = GPT(cfg.model())
    if cfg.lora_rank: model.add_lora(cfg.lora_rank)
    n, flops, memory = model.num_params(), model.estimate_flops(), trainer.estimate_memory(cfg, model)
    run, optimal = cfg.max_iters * (cfg.tokens_per_step or cfg.batch_size * cfg.block_size), 20 * n     # tokens
    parts = {"wte": "embedding", "wpe": "positions", "attn": "attention", "mlp": "MLP", "lm_head": "head"}
    for name, p in model.named_parameters():
        part = next((part for key, part in parts.items() if key in name.split(".")), "norms")
        count[part] += p.numel()
    table(["parameters", "count", "share"], [[part, v, f"{v / n:.1%}"] for part, v in [*count.items(), ("all", n)]])
    print()
    table(["memory, one device", "MiB"], [[part, v / 2 ** 20] for part, v in [*memory.items(), ("all", sum(memory.values()))]])
    print(f"\n{flops / 1e6:,.1f} MFLOP a token; this run: {run:,} tokens, {run / n:.1f} a parameter, {flops * run:.3g} FLOP\n"
          f"Chinchilla's 20 a parameter (arXiv:2203.15556): {optimal:,} tokens, {flops * optimal:.3g} FLOP\n")
    hours = {name: flops / (0.4 * peak) / 3600 for name, peak in trainer.PEAK_FLOPS.items() if peak}    # per token
    show = lambda h: f"{h:,.1f}" if h > 1 else f"{h:.1g}"
    table(["one GPU at 40% of its dense bf16 peak", "this run, hours", "20 tokens a parameter, hours"],
          [[name, show(run * each), show(optimal * each)] for name, each in hours.items()])

def bench_plot(argv):
    if not argv: raise ValueError("name the runs to draw: python bench.py plot out/a out/b")
    panels, styles, pale, dots = {"step": {}, "tokens": {}, "seconds": {}}, {}, dict(alpha=0.4), dict(marker="o")
    logs = {folder: read_run(folder)[1] for folder in argv}
    # of each run: the bits per byte in one nat per token, 0 if no evaluation tells; nats alone depend on the tokenizer
    scales = [next((r["val_bpb"] / r["val_loss"] for r in log if r.get("val_bpb")), 0) for log in logs.values()]
    bits = all(scales)                  # then all runs are drawn in bits per byte
    for n, (folder, log) in enumerate(logs.items()):
        scale = scales[n] if bits else 1
        best = scale * min((r["val_loss"] for r in log if r.get("val_loss")), default=math.nan)
        for key, label, look in (("loss", f"_{folder}", pale), ("val_loss", f"{folder}, best {best:.4f}", dots)):
            styles[label] = dict(color=f"C{n}", **look)
            points = [(r, scale * r[key]) for r in log if r.get(key)]
            for axis in panels: panels[axis][label] = [(r[axis], y) for r, y in points] or [(math.nan, math.nan)]
    if not importlib.util.find_spec("matplotlib"): raise ValueError("plot needs matplotlib: pip install matplotlib")
    unit = "bits per byte" if bits else "nats per token"
    plot(os.path.join(argv[0], "loss.png"), panels, styles, ylabel=f"{unit}: pale = training, dots = validation")

def fit_law(compute, loss):
    """(E, A, a) of loss = E + A * compute^-a (Kaplan et al. 2020, arXiv:2001.08361; Hoffmann et al. 2022): fits a line in log-log
    space for each E on a grid below the lowest loss, and takes the E with the smallest squared error of the loss."""
    compute, loss = np.array(compute)[:, None], np.array(loss)[:, None]             # (runs, 1)
    E = np.linspace(0, loss.min() * 0.999, 2000)
    slope, intercept = np.polyfit(np.log(compute[:, 0]), np.log(loss - E), 1)       # (2000,) each
    error = np.square(E + np.exp(intercept) * compute ** slope - loss).sum(0)
    best = np.where(np.isfinite(error), error, np.inf).argmin()
    return E[best], np.exp(intercept[best]), -slope[best]

def bench_scaling(argv):
    points = []
    for folder in argv:
        saved, log = read_run(folder)
        if saved["dataset"] != read_run(argv[0])[0]["dataset"]: print(f"{folder} has other text than {argv[0]}: no law fits both")
        log = [r for r in log if r.get("val_bpb")]
        if not log: raise ValueError(f"{folder} has no validation loss yet: train it to its first eval_interval")
        if log[-1]["step"] < saved["max_iters"]: print(f"{folder} has not ended: its loss at step {log[-1]['step']} is too high")
        shape = {key: value for key, value in saved.items() if hasattr(config.GPTConfig, key)}
        with torch.device("meta"): model = GPT(config.GPTConfig(**shape))
        points.append((model.estimate_flops() * log[-1]["tokens"], log[-1]["val_bpb"], model.num_params(), folder))
    if len({p[0] for p in points}) < 3: raise ValueError("three unknowns: give at least three runs that differ in compute")
    compute, loss, *_ = zip(*sorted(points))
    E, A, a = fit_law(compute, loss)
    if not (a > 1e-4 and math.isfinite(A)): raise ValueError("no law fits: the runs' loss does not fall as their compute grows")
    if len(points) == 3: print("three runs fit any law exactly: more are needed to test it")
    law = lambda compute: f"{E + A * compute ** -a:.4f}"
    table(["run", "parameters", "FLOP", "bits/byte", "law"],
          [[folder, n, f"{c:.3g}", f"{bits:.4f}", law(c)] for c, bits, n, folder in sorted(points)])
    print(f"\nbits per byte = {E:.4f} + {A:.4g} * FLOP^-{a:.4f}")
    table(["compute of the largest run", "predicted bits/byte"], [[f"{k} x", law(k * compute[-1])] for k in (2, 4, 10, 100)])

# ---------------------------------------------------------------------------- evaluation

ARC = "https://s3-us-west-2.amazonaws.com/ai2-website/data/ARC-V1-Feb2018.zip"
TASKS = {                               # name: (URL, pattern of the files to read in the archive)
    "hellaswag": ("https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl", ""),
    "arc_easy": (ARC, "/ARC-Easy-Test.jsonl$"), "arc_challenge": (ARC, "/ARC-Challenge-Test.jsonl$"),
    "mmlu": ("https://people.eecs.berkeley.edu/~hendrycks/data.tar", r"/test/\w+_test\.csv$")}

def task_lines(task):
    """The JSONL lines of a task: a file, or one of TASKS, which is downloaded into data/eval."""
    if not (task in TASKS or os.path.isfile(task)): raise ValueError(f"task={task!r} is no file, nor one of {', '.join(TASKS)}")
    url, wanted = TASKS.get(task, ("", ""))
    path = f"data/eval/{os.path.basename(url)}" if url else task
    if url: prepare.fetch(url, path)
    if not wanted: return sampler.read_file(path).split("\n")
    try:
        with zipfile.ZipFile(path) if url == ARC else tarfile.open(path) as archive:
            names, read = (archive.namelist(), archive.open) if url == ARC else (archive.getnames(), archive.extractfile)
            files = {name: read(name).read().decode() for name in sorted(names) if re.search(wanted, name)}
    except (tarfile.TarError, zipfile.BadZipFile, ValueError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete it to fetch it again") from None
    if url == ARC: return "".join(files.values()).split("\n")
    return [json.dumps(dict(subject=Path(name).stem.removesuffix("_test"), question=question, choices=choices, answer=answer))
            for name, text in files.items() for question, *choices, answer in csv.reader(io.StringIO(text, newline=""))]

def read_question(item):
    """A question of HellaSwag, ARC (as AI2 or the Hugging Face hub has it) or MMLU -> (context, endings, index of the right one),
    worded as in lm-evaluation-harness, zero-shot: {"question": "1+1?", "choices": ["1", "2"], "answer": 1}
    -> ("1+1?\nA. 1\nB. 2\nAnswer:", ["A", "B"], 1)"""
    if "endings" in item:
        if "activity_label" not in item: return item["ctx"], item["endings"], int(item["label"])    # a user's own questions
        texts = [f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}", *item["endings"]]
        texts = [re.sub(r"\[.*?\]", "", t.strip().replace(" [title]", ". ")).replace("  ", " ") for t in texts]
        return texts[0], texts[1:], int(item["label"])
    question, choices, answer = item["question"], item.get("choices"), item.get("answer")
    if "answerKey" in item:
        if isinstance(question, dict):          # AI2's own form
            question, choices = question["stem"], {key: [c[key] for c in question["choices"]] for key in ("text", "label")}
        return f"Question: {question}\nAnswer:", choices["text"], choices["label"].index(item["answerKey"])
    letters, subject = "ABCDEFGHIJ"[:len(choices)], item.get("subject", "").replace("_", " ")
    about = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    asked = about + question.strip() + "".join(f"\n{a}. {c}" for a, c in zip(letters, choices)) + "\nAnswer:"
    return asked, list(letters), letters.index(answer) if isinstance(answer, str) else int(answer)

def read_task(task, lines, tok, size):
    """[(ids of the context, ids of each ending, letters of each, index of the right one)]; a long context loses its beginning.
    Context and endings are stripped and joined by one blank."""
    questions, begin = [], sampler.ids_of(tok, sampler.BEGIN)
    for n, line in enumerate(lines, 1):
        if not line.strip(): continue
        try:
            context, endings, label = read_question(json.loads(line))
            if not all(map(str.strip, [context] + endings)): raise ValueError("empty text")
            if not 0 <= label < len(endings): raise ValueError("no such answer")
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"{task}, line {n}: not in the form of HellaSwag, ARC or MMLU ({e!r}): {line[:50]!r}") from None
        ids = [tok.encode(" " + e.strip()) for e in endings]
        longest = max(map(len, ids))
        room = size + 1 - longest - len(begin)      # for the context: the last id is scored, but never fed
        if room < 1: raise ValueError(f"{task}, line {n}: an ending of {longest} tokens does not fit block_size={size}")
        questions.append((begin + tok.encode(context.rstrip())[-room:], ids, [len(e.strip()) for e in endings], label))
    if not questions: raise ValueError(f"{task} has no questions")
    return questions

def score(model, questions):
    """For each question the log-probability of each ending, in nats. A context is read once; its endings continue its cache."""
    pairs = [(context, ending) for context, endings, *_ in questions for ending in endings]
    tokens = [torch.tensor(context[-1:] + ending, device=model.transformer.wte.weight.device) for context, ending in pairs]
    tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1)
    longest, half = max(len(context) for context, _ in pairs) + tokens.shape[1] - 2, len(questions) // 2
    if longest > model.config.block_size and half:      # their longest context and longest ending; one question alone always fits
        return score(model, questions[:half]) + score(model, questions[half:])
    cfg = config.Config(max_new_tokens=tokens.shape[1])
    rows = [sampler.Row(context, 0, None, cfg) for context, _ in pairs]
    cache = sampler.prefill(model, rows, cfg, Counter())        # all but each last id; equal contexts are read once
    found = model.log_probs(model.hidden(tokens[:, :-1].clamp(min=0), cache), tokens[:, 1:])
    return [part.tolist() for part in found.split([len(q[1]) for q in questions])]

def evaluate_task(model, tok, task, lines, batch_size):
    """A row of the table. Scores go, one line per question, to a file named after task, weights and questions, to resume from."""
    name, questions = os.path.basename(task).removesuffix(".jsonl"), read_task(task, lines, tok, model.config.block_size)
    questions.sort(key=lambda q: -len(q[0]))        # batches of similar lengths
    weights = [p.float().sum().item() for p in model.state_dict().values()]
    digest = hashlib.sha256(repr((model.config, tok.hash, weights, questions)).encode()).hexdigest()
    os.makedirs("out/bench", exist_ok=True)
    path = f"out/bench/eval_{name}_{digest[:12]}.jsonl"
    with prepare.lock(path + ".lock", f"{path}: waiting for another evaluation"), open(path, "a+", encoding="utf-8") as f:
        f.seek(0)
        done = [json.loads(line) for line in f if line.rstrip().endswith("]")]         # not a line that a kill cut short
        if done: print(f"{name}: resuming, {len(done):,} of {len(questions):,} questions are answered in {f.name}")
        add = prepare.progress(f"{name} questions", len(questions) - len(done))
        while len(done) < len(questions):
            found = score(model, questions[len(done):len(done) + batch_size])
            f.writelines("\n" + json.dumps(scores) for scores in found)     # the line end first: it ends a line cut short, too
            f.flush()
            add(len(found))
            done += found
    right = np.array([(np.argmax(scores) == label, np.argmax(np.divide(scores, sizes)) == label)
                      for scores, (_, _, sizes, label) in zip(done, questions)])
    n, chance = len(questions), statistics.mean(1 / len(endings) for _, endings, *_ in questions)
    return [name, n, *(f"{p:.2%} +- {math.sqrt(p * (1 - p) / max(n - 1, 1)):.2%}" for p in right.mean(0)), f"{chance:.2%}"]

def text_loss(model, tok, text, batch_size, stride):
    """(nats, tokens, bytes) of a text under the model. Windows of block_size tokens advance by `stride`, and each scores only the
    tokens that the one before did not. The first token follows tok.first, as in a sample."""
    ids, nats = torch.tensor(tok.first + tok.encode(text), device=model.transformer.wte.weight.device), 0.0
    n, device = len(ids) - 1, ids.device
    if n < 1: raise ValueError(f"nothing to score in an --input of {len(text)} characters ({text!r}): give a longer text")
    T = min(model.config.block_size, n)
    ends = torch.tensor([0, *range(T, n, stride), n], device=device)        # 0, then the end of each window
    add = prepare.progress("windows", len(ends) - 1)
    for last, end in zip(ends[:-1].split(batch_size), ends[1:].split(batch_size)):
        at = end[:, None] - T + torch.arange(T + 1, device=device)      # (B, T + 1)
        x, y = model.hidden(ids[at[:, :-1]]), ids[at[:, 1:]].masked_fill(at[:, 1:] <= last[:, None], -1)
        nats -= sum(model.log_probs(*row).item() for row in zip(x.split(1), y.split(1)))    # one by one: logits are large
        add(len(end))
    return nats, n, len(text.encode())

def bench_eval(argv):
    """A checkpoint (--out_dir), or published weights (--init_from), on texts (--input) and multiple-choice tasks (--task)."""
    cfg, rows = config.load(argv), []
    if not (cfg.input or cfg.task): raise ValueError("say what to evaluate on: --input=FILE, --task=hellaswag or FILE.jsonl")
    if ".jsonl" in cfg.input: raise ValueError("--input is scored as plain text: name .txt or other text files, not .jsonl")
    tasks = {task: task_lines(task) for task in filter(None, cfg.task.split(","))}
    model, tok, about = sampler.load(cfg)
    context = model.config.block_size
    stride = cfg.stride or max(context // 2, 1)
    if stride > context: raise ValueError(f"stride={stride} is longer than block_size={context}: tokens would be left out")
    print(f"{about} | {model.set_backend(training=False)}")
    for path in filter(None, cfg.input.split(",")):
        nats, tokens, size = text_loss(model, tok, sampler.read_file(path), cfg.batch_size, stride)
        rows.append([path, size, tokens, f"{nats / tokens:.4f}", math.exp(nats / tokens), f"{nats / math.log(2) / size:.4f}"])
    if rows: table(["text", "bytes", "tokens", "nats per token", "perplexity", "bits per byte"], rows)
    rows = [evaluate_task(model, tok, task, lines, cfg.batch_size) for task, lines in tasks.items()]
    if rows: table(["task", "questions", "acc", "acc_norm", "chance"], rows)

# ---------------------------------------------------------------------------- the command line

def main(argv):
    commands = {name[6:]: function for name, function in globals().items() if name.startswith("bench_")}
    if argv[:1] in ([], ["-h"], ["--help"]): return print(__doc__.strip())
    if argv[0] not in commands: raise ValueError(f"unknown benchmark {argv[0]!r}: choose one of {', '.join(commands)}")
    if {"-h", "--help"} & set(argv): return print((commands[argv[0]].__doc__ or __doc__).strip())
    commands[argv[0]](argv[1:])

if __name__ == "__main__":
    config.run(main, parse=list)
