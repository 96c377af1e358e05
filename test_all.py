"""
What every stage promises, each promise checked against an independent twin: naive code, float64 arithmetic, another library.

    python -m pytest test_all.py                    # all that can run here; each skip says what it needs
    python -m pytest test_all.py -k "model or train"
    python -m pytest test_all.py -k peer            # against optional libraries: pip install transformers tokenizers ..
"""
import base64, concurrent.futures, copy, csv, dataclasses, glob, hashlib, html, http.server, importlib, importlib.util, io
import itertools, json, math, multiprocessing, os, random, re, shutil, signal, subprocess, sys, tarfile, threading, time, types
import typing, warnings, weakref, zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # set before importing numpy and torch: such small matrices only lose by threads
os.environ["NO_PROXY"] = "127.0.0.1"            # where the tests' own servers are
import numpy as np
import pytest
import tiktoken
import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")    # before anything imports triton
HERE = os.path.dirname(os.path.abspath(__file__))
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", HERE)])         # for scripts in other folders
sys.path.insert(0, HERE)

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from bpe import GPT2_SPLIT, GPT4_SPLIT, CL100K_SPLIT, Tokenizer
import bench
import bpe
import config
import flash_attn
import model as model_py
import prepare
import sample
import train

torch.backends.mps.is_available = lambda: False         # on a Mac, too, the tests compare with the CPU
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: fork and /proc")
flash_gpu = torch.cuda.is_available()
flash_device = torch.device("cuda" if flash_gpu else "cpu")
flash_numpy = flash_attn.triton is not None and not flash_gpu and flash_attn.triton.__version__ < "3.7" and \
    tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
needs_flash = pytest.mark.skipif(
    flash_attn.triton is None or flash_numpy,
    reason="no Triton: pip install triton (Linux only)" if flash_attn.triton is None else
    "the interpreter of Triton before 3.7 fails with NumPy 2.4: pip install 'triton>=3.7' or 'numpy<2.4', or run on a GPU")
needs_gpu = pytest.mark.skipif(not flash_gpu or torch.cuda.get_device_capability()[0] < 8,
                               reason="no CUDA GPU: run on a machine with one of compute capability 8.0 or newer")


def raising(error):
    """A function that raises it, whatever it is called with."""
    def fail(*args, **kw): raise error
    return fail


@pytest.fixture
def here(tmp_path, monkeypatch):
    """tmp_path, made the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

# ======================================================== config/: defaults, files and flags in order; errors name the knob

CONFIG_FILES = sorted(p for p in glob.glob(os.path.join(HERE, "config", "*.py")) if not p.endswith("__init__.py"))


def test_config_run_prints_names_that_no_terminal_can_show(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stdout", out)
    config.run(lambda cfg: print("\udcff é", flush=True))
    assert out.buffer.getvalue() == b"\\udcff \\xe9\n"
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=out.write, flush=out.flush))     # like a notebook's stdout
    config.run(lambda cfg: print("there", flush=True))
    assert out.buffer.getvalue().endswith(b"there\n")
    monkeypatch.setattr(sys, "stderr", None)                                                        # closed by 2>&-
    config.run(lambda cfg: sys.stderr.write("lost"))


def test_config_order_types_and_flags():
    """The command line overrides config files wherever it names them; 1e3 is accepted as an int; a value may contain =."""
    path = os.path.join(HERE, "config", "stdlib.py")
    cfg = config.load(["--max_iters=1e3", path, "--start=a=b", "--no_bias", "--compile", "--dropout=0"])
    found = cfg.dataset, cfg.max_iters, cfg.start, cfg.bias, cfg.compile, cfg.dropout
    assert found == ("stdlib", 1000, "a=b", False, True, 0.0)
    assert isinstance(cfg.dropout, float) and config.load(["--compile=none"]).compile is None
    assert config.load(["--rope_theta=1e20"]).rope_theta == 1e20 and config.load(["--start=1e3"]).start == "1e3"
    with pytest.raises(ValueError, match="n_layer wants int, not '2'"): config.GPTConfig(n_layer="2")


@pytest.mark.parametrize("argv, message", [
    (["--max_iter=3"], "did you mean 'max_iters'"), (["nothing.py"], "no config file"),
    (["--input", "bpe.py"], "--input: input wants str, not True: write --key=value, with the ="),
    (["notes.txt"], "'notes.txt' is neither a config file (.py) nor a knob: write --key=value, with the ="),
    (["--min_lr=1e-4"], "did you mean 'min_lr_frac'"),          # nanoGPT's name; by spelling alone, min_p would be nearest
    # wrong type
    (["--max_iters=x"], "max_iters wants int, not 'x'"), (["--max_iters=1.5"], "wants int"),
    (["--max_iters=1e30"], "wants int"), (["--max_iters=None"], "wants int, not 'None'"), (["--bias=1"], "wants True or False"),
    (["--compile=1"], "wants True or False or None, not '1'"), (["--mlp=foo"], "'relu2' or 'swiglu' or 'gelu'"),
    (["--learning_rate=nan"], "wants float, not nan"), (["--learning_rate=1e999"], "wants float"),
    # out of range
    (["--max_iters=-3"], "negative"), (["--batch_size=0"], "at least 1"), (["--top_p=0"], "(0, 1]"), (["--beta2=1"], "below 1"),
    (["--top_p=1.1"], "(0, 1]"), (["--repetition_penalty=0"], "above 0"), (["--temperature=1e-40"], "0 or at least"),
    (["--dropout=-0.1"], "negative"), (["--dropout=1"], "below 1"), (["--min_p=1.5"], "in [0, 1]"),
    (["--val_fraction=1"], "in (0, 1)"),
    # knobs that contradict each other
    (["--n_embd=100"], "n_embd=100 is not divisible by n_head=12"),
    (["--n_kv_head=5"], "n_head=12 is not divisible by n_kv_head=5"), (["--n_embd=12"], "must be even"),
    (["--tie_weights"], "zero_init"), (["--norm_gain", "--norm=layernorm"], "norm_gain"),
    (["--window_pattern=SX", "--window=8"], "'SX'"), (["--pos=sinusoidal", "--n_embd=33", "--n_head=3"], "even n_embd"),
    (["--dpo_beta=0"], "above 0"), (["--num_beams=2"], "temperature=0"),
    (["--num_beams=2", "--temperature=0", "--speculate=1"], "speculate=0"),
    (["--num_beams=2", "--temperature=0", "--num_samples=3"], "num_samples <= num_beams")])
def test_config_errors(argv, message):
    with pytest.raises(ValueError) as e: config.load(argv)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_config_file_errors(tmp_path):
    (tmp_path / "good.py").write_text("import math\n_half = 3\nn_layer = 2 * _half")
    assert config.load([str(tmp_path / "good.py")]).n_layer == 6            # modules and names that begin with _ are not knobs
    for text, message in (("max_iters = 'ten'", "max_iters wants int, not 'ten'"), ("bias = 1", "not 1"),
                          ("n_layers = 3", "did you mean 'n_layer'"), ("x = (", "SyntaxError")):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)): config.load([str(tmp_path / "bad.py")])
    (tmp_path / "bad.py").write_text("1 / 0")                               # is not run: a wrong flag is found first
    with pytest.raises(ValueError, match="--input"): config.load([str(tmp_path / "bad.py"), "--input"])


def test_config_run_turns_errors_into_a_line_and_a_code(capsys):
    for error, code in ((ValueError("bad"), "error: bad"), (KeyboardInterrupt(), 130), (MemoryError(), "error: out of memory")):
        with pytest.raises(SystemExit) as e: config.run(raising(error), parse=list)
        assert e.value.code == code
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_config_every_knob_is_used():
    """No dead options: every knob is read by a script or checked in config itself."""
    source = "".join(open(os.path.join(HERE, f"{s}.py")).read() for s in ("prepare", "train", "sample", "bench", "model"))
    source += open(os.path.join(HERE, "config", "__init__.py")).read().split("head_dim = ")[1].split("@dataclass")[0]
    for kind in config.KINDS.values():      # a branch for each choice but one, which may be the `else`
        assert sum(isinstance(choice, str) and f'"{choice}"' not in source for choice in typing.get_args(kind)) <= 1, kind
    assert not [f.name for f in dataclasses.fields(config.Config) if not re.search(rf"\b(cfg|config|self|c)\.{f.name}\b", source)]


def test_config_files_load(capsys):
    """Any script can load any config file: they all call main(load(words)), and load is shared."""
    for path in CONFIG_FILES:
        cfg = config.load([path, "--seed=7"])
        assert cfg.seed == 7 and cfg.model().vocab_size <= 65536
    with pytest.raises(SystemExit): config.load([path, "--help"])
    said = re.findall(r"^  --(\w+) .*\w.* \(default .+\)$|^  --(.*)", capsys.readouterr().out, re.M)
    assert said == [(knob, "") for knob in config.KINDS]                # every knob with its comment, and nothing else


def test_config_fills_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    cfg = config.load(["--out_dir=~/a~", "--input=~, ~/b,c/~", "--start=~"])            # shells leave the ~ after a =
    assert (cfg.out_dir, cfg.input, cfg.start) == ("/h/a~", "/h, /h/b,c/~", "~")


def test_config_help_for_head_ends_without_an_error():
    shell = f'"{sys.executable}" sample.py --help | head -1'
    result = subprocess.run(shell, shell=True, cwd=HERE, capture_output=True, text=True)
    assert result.stdout.startswith("Every knob") and result.stderr == ""


@pytest.mark.parametrize("line, message", [
    ("prepare.py --dataset=x --input=nowhere", "--input: there is no file or folder 'nowhere'\n"),
    ("train.py --max_iter=3", "--max_iter: unknown knob 'max_iter', did you mean 'max_iters'"),
    ("sample.py", "no checkpoint in out/*: check --out_dir, or: python train.py")])
def test_config_scripts_end_user_errors_with_one_line_and_code_1(line, message, tmp_path):
    script, *words = line.split()
    done = subprocess.run([sys.executable, os.path.join(HERE, script), *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not os.listdir(tmp_path)

# ======================================================== model.py: naive float64 models; transformers

def tiny(**kw):
    return config.GPTConfig(**{**dict(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32), **kw})


def tiny_gpt(seed=0, noise=0.2, **kw):
    """A small model with no parameter left at zero, so that an error in any path shows."""
    torch.manual_seed(seed)
    model = model_py.GPT(tiny(**kw)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * noise)
    return model


CLASSIC = dict(pos="learned", norm="layernorm", mlp="gelu", bias=True, qk_norm=False, tie_weights=True, zero_init=False)
SHAPES = [dict(), dict(n_kv_head=2), dict(n_kv_head=1, mlp="swiglu", logit_softcap=5.0), CLASSIC,
          dict(pos="sinusoidal", qk_norm=False), dict(n_kv_head=2, head_size=12, norm_gain=True, norm_eps=1e-6)]


def test_model_classic_has_gpt2_parameter_count():
    with torch.device("meta"): model = model_py.GPT(config.load([os.path.join(HERE, "config", "gpt2_124m_classic.py")]).model())
    assert model.num_params() == 124_439_808
    assert not [name for name, _ in model_py.GPT(tiny(norm="layernorm")).named_parameters() if "bias" in name]


def test_model_dropout_is_in_every_place_and_only_in_training(monkeypatch):
    model, seen = tiny_gpt(dropout=0.3), []
    monkeypatch.setattr(model_py.F, "dropout", lambda x, p, training: seen.append(p * training) or x)
    monkeypatch.setattr(model_py, "attention", lambda q, *args: seen.append(args[6]) or q)
    for on in (True, False):
        model.train(on)(torch.zeros(1, 3, dtype=torch.long))
        assert seen == [0.3 * on] * 7            # the embedding; in each of 2 layers attention, its output and the MLP
        seen.clear()


def test_model_rope_is_complex_multiplication():
    cfg = tiny(n_embd=64, rope_theta=500.0)
    x, (cos, sin) = torch.randn(2, 3, 32, 16, dtype=torch.float64), model_py.position_table(cfg)
    z = torch.complex(x[..., :8], x[..., 8:])
    angle = torch.arange(32.0).double()[:, None] * 500.0 ** -(torch.arange(0, 16, 2).double() / 16)
    turn = torch.polar(torch.ones_like(angle), angle)
    ours = model_py.apply_rope(x, cos.double(), sin.double())
    torch.testing.assert_close(ours, torch.cat(((z * turn).real, (z * turn).imag), -1), atol=2e-6, rtol=0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)       # q.k depends only on the distance
    dot = lambda i, j: (model_py.apply_rope(q, cos[i], sin[i]) * model_py.apply_rope(k, cos[j], sin[j])).sum()
    torch.testing.assert_close(dot(9, 4), dot(25, 20), atol=1e-5, rtol=1e-5)
    assert (dot(9, 4) - dot(9, 5)).abs() > 1e-3


def naive_attention(q, k, v):
    """The textbook formula in float64, one query at a time: causal, aligned bottom-right, grouped heads by index."""
    B, H, T, D = q.shape
    S, out = k.shape[2], torch.zeros_like(q)
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        kh, n = h * k.shape[1] // H, i + S - T + 1
        weights = (k[b, kh, :n] @ q[b, h, i] / D ** 0.5).exp()
        out[b, h, i] = (weights / weights.sum()) @ v[b, kh, :n]
    return out


@pytest.mark.parametrize("T, S, K", [(7, 7, 4), (1, 9, 2), (3, 9, 1), (1, 1, 4)])
def test_model_attention_against_naive_float64(T, S, K):
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((4, T), (K, S), (K, S)))
    mask = model_py.sdpa_mask(torch.arange(S - T, S), S)
    torch.testing.assert_close(model_py.attention(q, k, v, mask=mask), naive_attention(q, k, v))


def naive_gpt2(p, idx, n_head, n_layer):
    """GPT-2's forward pass from a state dict, in plain float64 algebra; shares no code with model.py."""
    p = {k: v.double() for k, v in p.items()}
    normalised = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    ln = lambda x, n: normalised(x) * p[n + ".weight"] + p[n + ".bias"]
    lin = lambda x, n: x @ p[n + ".weight"].T + p[n + ".bias"]
    x = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][:idx.shape[1]]
    heads = lambda t: t.view(*t.shape[:2], n_head, -1).transpose(1, 2)
    for i in range(n_layer):
        n = f"transformer.h.{i}."
        h = ln(x, n + "ln_1")
        y = naive_attention(*(heads(lin(h, n + "attn." + c)) for c in ("c_q", "c_k", "c_v"))).transpose(1, 2).flatten(2)
        x = x + lin(y, n + "attn.c_proj")
        h = lin(ln(x, n + "ln_2"), n + "mlp.c_fc")
        x = x + lin(0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h ** 3))), n + "mlp.c_proj")
    return ln(x, "transformer.ln_f") @ p["transformer.wte.weight"].T


def test_model_classic_against_naive_gpt2():
    model, idx = tiny_gpt(**CLASSIC), torch.randint(61, (2, 11))
    torch.testing.assert_close(model(idx)[0].double(), naive_gpt2(model.state_dict(), idx, 4, 2), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("K", [4, 2, 1])
def test_model_modern_against_naive(K):
    """RMSNorm, QK-norm, RoPE, grouped queries, ReLU^2, soft-cap, untied head, written out independently in float64."""
    model, idx = tiny_gpt(logit_softcap=3.0, n_kv_head=K), torch.randint(61, (2, 11))
    p = {k: v.double() for k, v in model.state_dict().items()}
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    angle = torch.arange(11.0).double()[:, None] * 10000.0 ** -(torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angle), angle)
    def rope(x):
        z = torch.complex(x[..., :4], x[..., 4:]) * turn
        return torch.cat((z.real, z.imag), -1)
    heads = lambda t: t.view(2, 11, -1, 8).transpose(1, 2)
    x = p["transformer.wte.weight"][idx]
    for i in range(2):
        w = lambda n: p[f"transformer.h.{i}.{n}.weight"].T
        h = rms(x)
        y = naive_attention(rope(rms(heads(h @ w("attn.c_q")))), rope(rms(heads(h @ w("attn.c_k")))), heads(h @ w("attn.c_v")))
        x = x + y.transpose(1, 2).flatten(2) @ w("attn.c_proj")
        x = x + (rms(x) @ w("mlp.c_fc")).relu() ** 2 @ w("mlp.c_proj")
    expected = 3 * torch.tanh(rms(x) @ p["lm_head.weight"].T / 3)
    torch.testing.assert_close(model(idx)[0].double(), expected, atol=2e-4, rtol=1e-4)


def test_model_sinusoidal_positions_as_vaswani_wrote_them():
    """The same weights with sin(t / 10000^(2d/C)), cos(..) as learned positions and the embedding times sqrt(C)."""
    model, twin, idx = tiny_gpt(pos="sinusoidal"), tiny_gpt(pos="learned"), torch.randint(61, (2, 11))
    waves = [[(math.sin, math.cos)[d % 2](t / 10000 ** (2 * (d // 2) / 32)) for d in range(32)] for t in range(32)]
    p = model.state_dict() | {"transformer.wpe.weight": torch.tensor(waves)}
    twin.load_state_dict(p | {"transformer.wte.weight": p["transformer.wte.weight"] * math.sqrt(32)})
    torch.testing.assert_close(model(idx)[0], twin(idx)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kw", SHAPES)
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 8, 3], [19, 1]])
def test_model_cached_logits_equal_uncached(kw, chunks):
    """Whether the text is fed whole, token by token or in chunks."""
    model, idx = tiny_gpt(**kw), torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
    cache = model_py.KVCache(model.config, 2, 20, torch.device("cpu"), torch.float32)
    logits = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(idx)[0], atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no room for 1 more"): model(idx[:, :1], cache=cache)


@pytest.mark.parametrize("kw", SHAPES)
def test_model_ragged_cache_equals_solo_rows(kw):
    """Prompts of different lengths in one batch, then single steps; then rows are dropped and reordered, as beam search does."""
    model, lengths = tiny_gpt(**kw), [3, 9, 1]
    rows = [torch.randint(61, (1, n + 4)) for n in lengths]
    padded = torch.zeros(3, 9, dtype=torch.long)
    for b, n in enumerate(lengths): padded[b, :n] = rows[b][0, :n]
    cache = model_py.KVCache(model.config, 3, 16, torch.device("cpu"), torch.float32)
    first = model(padded, cache=cache)[0]
    cache.set_lengths(lengths)
    more = torch.stack([row[0, n:] for row, n in zip(rows, lengths)])
    second = torch.cat([model(part, cache=cache)[0] for part in more.split([1, 2, 1], dim=1)], dim=1)
    for b, n in enumerate(lengths):
        alone = model(rows[b])[0][0]
        torch.testing.assert_close(first[b, :n], alone[:n], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(second[b], alone[n:], atol=2e-4, rtol=1e-4)
    cache.reorder([2, 0])
    again = model(torch.stack([rows[2][0, -1:], rows[0][0, -1:]]), cache=cache)[0]
    for b, r in enumerate((2, 0)):
        torch.testing.assert_close(again[b, 0], model(torch.cat((rows[r], rows[r][:, -1:]), 1))[0][0, -1], atol=2e-4, rtol=1e-4)


def test_model_compiled_steps_write_into_the_cache_in_place():
    """The compiled step allocates no tensor as large as a layer's cache: allocating one would mean that the cache is copied."""
    from torch._inductor.utils import run_and_get_code
    model = tiny_gpt(n_kv_head=2).requires_grad_(False).eval()
    cache = model_py.KVCache(model.config, 3, 24, torch.device("cpu"), torch.float32)
    cache.static = True
    cache.set_lengths([0, 0, 0])
    step = torch.compile(lambda idx, cache: model.head(model.hidden(idx, cache)), dynamic=False, fullgraph=True)
    logits, (code,) = run_and_get_code(step, torch.tensor([[1], [2], [3]]), cache)
    torch.testing.assert_close(logits, model(torch.tensor([[1], [2], [3]]))[0], atol=1e-5, rtol=1e-4)
    assert "(3, 1, 32)" in code and not re.search(r"empty_strided_cpu\(\((2, )?3, 2, 24, 8\)", code)


def test_model_cache_size_is_the_formula():
    cache = model_py.KVCache(tiny(n_kv_head=2), 3, 10, torch.device("cpu"), torch.float16)
    assert sum(t.nbytes for t in cache.k + cache.v) == 2 * 2 * 3 * 2 * 10 * 8 * 2
    for lengths in ([11, 1, 1], [1, 1]):
        with pytest.raises(AssertionError): cache.set_lengths(lengths)


@pytest.mark.parametrize("kw", SHAPES)
def test_model_is_causal(kw):
    model, idx = tiny_gpt(**kw), torch.randint(61, (1, 16))
    before, idx2 = model(idx)[0], idx.clone()
    idx2[0, 9] = (idx2[0, 9] + 1) % 61
    after = model(idx2)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-6, rtol=0)
    assert (before[:, 9] - after[:, 9]).abs().max() > 1e-3 and (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 1e-4


def test_model_initial_standard_deviations_and_loss():
    torch.manual_seed(0)
    classic = model_py.GPT(tiny(**{**CLASSIC, "n_embd": 128, "vocab_size": 512, "n_layer": 8}))
    for name, p in classic.named_parameters():
        if p.dim() == 1: assert torch.all(p == (1.0 if "ln" in name and "weight" in name else 0.0)), name
        else: assert p.std().item() == pytest.approx(0.02 / 4 if name.endswith("c_proj.weight") else 0.02, rel=0.05), name
    modern = model_py.GPT(tiny(vocab_size=512, n_embd=128))
    for name, p in modern.named_parameters():
        if "c_proj" in name or "lm_head" in name: assert not p.any(), name
        else: assert p.std().item() == pytest.approx(0.02, rel=0.05), name
    idx = torch.randint(512, (4, 33))
    for model in (classic, modern):
        assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(math.log(512), abs=0.1 if model is classic else 1e-5)


@pytest.mark.parametrize("kw", SHAPES)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_model_optimizers_cover_every_parameter_once(kw, optimizer):
    model, cfg = model_py.GPT(tiny(**kw)), config.Config(optimizer=optimizer, weight_decay=0.1)
    optimizers = model.configure_optimizers(cfg)
    groups = [(g, o) for o in optimizers for g in o.param_groups]
    assert sorted(id(p) for g, _ in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    muon = {id(p) for g, o in groups for p in g["params"] if isinstance(o, torch.optim.Muon)}
    assert muon == ({id(p) for p in model.transformer.h.parameters() if p.dim() == 2} if optimizer == "muon" else set())
    decayed = {id(p) for g, _ in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == (muon or {id(p) for p in model.parameters() if p.dim() == 2})
    rate = {id(p): g["lr"] for g, _ in groups for p in g["params"]}
    if optimizer == "muon":
        outside = {name: rate[id(p)] for name, p in model.named_parameters() if p.dim() == 2 and ".h." not in name}
        tied, head = model.config.tie_weights, cfg.unembedding_lr       # learned positions and a tied matrix: as the head
        assert outside.pop("transformer.wte.weight") == (head if tied else cfg.embedding_lr) and {*outside.values()} == {head}
        assert {rate[i] for i in muon} == {cfg.matrix_lr}
    else: assert set(rate.values()) == {cfg.learning_rate}


def test_model_optimizers_are_sharded_if_asked():
    """The weights are the same either way, in two ranks or one: only the optimizers' kind tells."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try: kinds = [type(o).__name__ for o in model_py.GPT(tiny()).configure_optimizers(config.Config(shard_optimizer=True))]
    finally: torch.distributed.destroy_process_group()
    assert kinds == ["ZeroRedundancyOptimizer"] * 2


def test_model_muon_multiplies_in_float32_where_bfloat16_is_emulated(monkeypatch):
    """One step of both kinds against Newton-Schulz in float64: bfloat16 is off by per cents, float32 is not. Gradients stay."""
    for emulated in (True, False):
        monkeypatch.setattr(model_py, "has_bfloat16", lambda device: not emulated)
        model = model_py.GPT(tiny(zero_init=False))
        muon = model.configure_optimizers(config.Config(matrix_lr=1.0))[1]
        assert type(muon) is (model_py.Float32Muon if emulated else torch.optim.Muon)
        for p in model.parameters(): p.grad = torch.randn_like(p)
        grads, before = [p.grad.clone() for p in model.parameters()], {p: p.clone() for p in muon.param_groups[0]["params"]}
        muon.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        for p, old in before.items():
            x = p.grad.double() * (0.05 * 0.95 + 0.05)          # Nesterov momentum 0.95, from zero
            x = x.T if p.shape[0] > p.shape[1] else x
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            x = (x.T if p.shape[0] > p.shape[1] else x) * max(1, p.shape[0] / p.shape[1]) ** 0.5
            error = ((old - p) - x).norm().item() / x.norm().item()
            assert error < 1e-4 if emulated else 1e-3 < error < 0.1


@pytest.mark.parametrize("kw", SHAPES)
def test_model_flops_against_torch_counter(kw):
    """The FLOP estimate is torch's own count outside attention; there it counts the whole T x T matrix, as PaLM does. With biases
    and gains, which it counts, too, it is nearly so."""
    model = model_py.GPT(tiny(block_size=32, n_embd=32, vocab_size=64, **kw)).train()
    def without_attention(self, x, *_):
        return self.c_proj(self.c_q(x) + self.c_k(x).sum(-1, keepdim=True) + self.c_v(x).sum(-1, keepdim=True))
    for block in model.transformer.h: block.attn.forward = types.MethodType(without_attention, block.attn)
    idx = torch.randint(64, (1, 32))
    with FlopCounterMode(display=False) as counter: model(idx, idx)[1].backward()
    want = 32 * (model.estimate_flops() - 12 * 2 * model.config.n_head * model.config.head_dim * 32)
    assert counter.get_total_flops() == pytest.approx(want, rel=0.05 if kw else 0)
    with torch.no_grad(), FlopCounterMode(display=False) as evaluation: model(idx, idx)
    assert evaluation.get_total_flops() == counter.get_total_flops() / 3                # without gradients: forward only


def model_by_kernels(model):
    """The same model with flash_attn.py's kernels for attention, on the GPU if there is one."""
    if needs_flash.args[0]: pytest.skip(needs_flash.kwargs["reason"])
    torch.set_float32_matmul_precision("highest")       # an earlier test of train.py may have turned TF32 on
    model.to(flash_device).backend = "flash_attn"
    return model


@pytest.mark.parametrize("H, K, window, docs", [(4, 4, 0, False), (4, 2, 5, False), (6, 1, 3, True)])
def test_model_whole_attention_against_float64(H, K, window, docs, monkeypatch):
    """Training in bfloat16 on a CPU: outputs and gradients as good as SDPA's, and SDPA wherever else."""
    T, wholes, whole = 33, [], model_py.whole_attention
    monkeypatch.setattr(model_py, "whole_attention", lambda *args: wholes.append(1) or whole(*args))
    make = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(2, heads, T, 16, generator=make).bfloat16() for heads in (H, K, K, H))
    doc = flash_documents(2, T, T) if docs else None
    mask = model_py.sdpa_mask(torch.arange(T), T, window, doc)

    def run(attend, dtype):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        return [y := attend(*inputs), *torch.autograd.grad(y, inputs, dy.to(dtype))]
    right = run(lambda *x: flash_attn.attention_ref(*x, window=window, doc_start=doc), torch.float64)
    for a, b in zip(run(lambda *x: model_py.attention(*x, mask=mask), torch.bfloat16), right, strict=True):
        assert a.dtype == torch.bfloat16 and (a - b).abs().max() < 0.01 * b.abs().max()
    with torch.no_grad(): drawn = torch.stack([whole(q, k, v, mask, 0.5) for _ in range(400)]).double().mean(0)
    assert wholes == [1] and (drawn - right[0]).abs().max() < 0.3 * right[0].abs().max()       # dropout keeps the mean
    assert (whole(q, k, v, mask, 0.5) - right[0]).abs().max() > 0.3 * right[0].abs().max()
    run(lambda *x: model_py.attention(*x, mask=mask), torch.float32)
    model_py.attention(q, k, v, mask=mask)
    assert wholes == [1]


@pytest.mark.parametrize("backend", ["sdpa", "flash_attn"])
def test_model_windows_against_naive(backend, monkeypatch):
    """Each layer equals attention_ref with that layer's window: S short, L all; the last layer sees all whatever its letter."""
    model, idx = tiny_gpt(n_layer=3, window_pattern="SLS", window=3), torch.randint(61, (2, 11))
    real, seen = model_py.attention, []
    if backend == "flash_attn": model_by_kernels(model)
    monkeypatch.setattr(model_py, "attention", lambda *args: seen.append((args[:3], real(*args))) or seen[-1][1])
    model(idx.to(model.lm_head.weight.device))
    for (args, y), window in zip(seen, (3, 0, 0), strict=True):
        torch.testing.assert_close(y, flash_attn.attention_ref(*args, window=window), atol=1e-5, rtol=1e-4)
    assert (seen[0][1] - flash_attn.attention_ref(*seen[0][0])).abs().max() > 1e-2


def test_model_cache_by_the_kernels_equals_uncached_sdpa():
    """Prompts of different lengths, then one step: flash_decode gets the windows, the grouped heads and each row's length."""
    shape = dict(n_layer=3, n_kv_head=2, window_pattern="SL", window=4)
    model, plain, idx = model_by_kernels(tiny_gpt(**shape)), tiny_gpt(**shape).to(flash_device), torch.randint(61, (2, 12))
    idx, cache = idx.to(flash_device), model_py.KVCache(model.config, 2, 12, flash_device, torch.float32)
    for part, lengths in ((idx[:, :9], [9, 6]), (idx[:, 9:10], [10, 7])):
        step = model(part, cache=cache)[0]
        cache.set_lengths(lengths)
    for b, n in enumerate((9, 6)):
        text = torch.cat((idx[b:b + 1, :n], idx[b:b + 1, 9:10]), 1)
        torch.testing.assert_close(step[b, 0], plain(text)[0][0, n], atol=2e-4, rtol=1e-4)
    cache.set_lengths([0, 0])
    torch.testing.assert_close(model(idx[:, :7], cache=cache)[0], plain(idx[:, :7])[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "flash_attn"])
def test_model_document_mask_equals_each_document_alone(backend):
    """Documents packed into a row have the logits and gradients of each alone (RoPE), with windows and gradient checkpointing."""
    shape, end = dict(n_layer=3, window_pattern="SL", window=4), 60
    model, ids = tiny_gpt(**shape).train(), torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(2))
    if backend == "flash_attn": model_by_kernels(model)
    cuts = [(9, 10), (1, 16)]           # where documents begin, with an end-of-text token; a row may begin inside one
    for row, at in zip(ids, cuts): row[list(at)] = end
    device = model.lm_head.weight.device
    model.eot, model.grad_checkpoint, twin, ids = end, True, tiny_gpt(**shape).to(device), ids.to(device)
    logits, loss = model(ids)[0], model(ids[:, :-1], ids[:, 1:])[1]
    loss.backward()
    losses = []
    for b, at in enumerate(cuts):
        for first, last in zip((0, *at), (*at, 24)):
            alone = twin(ids[b:b + 1, first:last])[0][0]
            torch.testing.assert_close(logits[b, first:last], alone, atol=2e-4, rtol=1e-4)
            n = min(last, 23) - first               # a document's last token predicts the first of the next
            losses.append(torch.nn.functional.cross_entropy(alone[:n], ids[b, first + 1:first + 1 + n], reduction="sum"))
    (sum(losses) / 46).backward()
    assert loss.item() == pytest.approx(sum(losses).item() / 46, rel=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3)
    cache = model_py.KVCache(model.config, 2, 24, device, torch.float32)
    sampled = model.eval()(ids, cache=cache)[0]                     # with a cache, documents are not masked
    torch.testing.assert_close(sampled, twin(ids)[0], atol=2e-4, rtol=1e-4)


def test_model_windows_and_documents_compile_with_dropout_and_no_mask_is_built_twice(monkeypatch):
    torch.manual_seed(0)
    model = tiny_gpt(n_layer=3, window_pattern="SSL", window=4, dropout=0.5).train()
    ids, made, real = torch.randint(61, (2, 16)), [], model_py.sdpa_mask
    model.set_backend()
    model.eot, model.grad_checkpoint = 60, True
    monkeypatch.setattr(model_py, "sdpa_mask", lambda *args: made.append(args[2]) or real(*args))
    model(ids, ids)[1].backward()
    assert sorted(made) == [0, 4]
    compiled = torch.compile(model, backend="aot_eager")
    compiled(ids, ids)[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(compiled.eval()(ids)[0], model.eval()(ids)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
def test_model_stream_is_bfloat16_under_autocast_alone(device):
    model, idx = tiny_gpt().to(device), torch.randint(61, (2, 9), device=device)
    for dtype, enabled, want in ((torch.bfloat16, True, torch.bfloat16), (torch.float16, True, torch.float32),
                                 (torch.bfloat16, False, torch.float32)):
        seen = []
        hooks = [block.register_forward_pre_hook(lambda block, args: seen.append(args[0].dtype)) for block in model.transformer.h]
        with torch.autocast(device, dtype, enabled=enabled): model(idx)
        for hook in hooks: hook.remove()
        assert seen == [want] * 2


def test_model_flops_of_windows():
    flops = lambda **kw: model_py.GPT(tiny(n_layer=4, **kw)).estimate_flops()
    assert flops() - flops(window_pattern="SL", window=5) == 12 * 32 * 2 * (32 - 5)
    assert flops() == flops(window_pattern="SL", window=99)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_model_fused_loss_against_plain_cross_entropy(cap, padding):
    """Loss and both gradients in float64, with a chunk size that does not divide the rows, some targets ignored, and a padded
    head, as on a GPU if vocab_size is no multiple of 64."""
    x, w = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (23, 11))
    targets = torch.randint(11, (23,))
    targets[[0, 7, 22]] = -1
    logits = x @ w.T
    expected = torch.nn.functional.cross_entropy(cap * torch.tanh(logits / cap) if cap else logits, targets, ignore_index=-1)
    grads = torch.autograd.grad(3 * expected, (x, w))
    def loss(x, w):
        return model_py.LinearCrossEntropy.apply(x, torch.nn.functional.pad(w, (0, 0, 0, padding)), targets, 11, cap, 5)
    for work in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):       # compiled, it takes another path
        ours = work(x, w)
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(3 * ours, (x, w)), grads): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with pytest.raises(AssertionError, match="second derivative"): torch.autograd.grad(loss(x, w), x, create_graph=True)


def test_model_fused_loss_in_float16_keeps_the_gradients_of_many_rows():
    """Divided by so many rows, gradients underflow float16, and the loss scale multiplies them only later: keep them."""
    x, w = (torch.randn(n, 8).mul_(0.01).requires_grad_() for n in (20000, 512))
    targets = torch.randint(512, (20000,))
    exact = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ w.T, targets), (x, w))
    with torch.autocast("cpu", torch.float16): loss = model_py.LinearCrossEntropy.apply(x, w, targets, 512, 0.0)
    for a, b in zip(torch.autograd.grad(65536 * loss, (x, w)), exact): assert (a / 65536 - b).norm() < 0.01 * b.norm()


def test_model_masked_targets_give_no_loss_and_no_gradient():
    """Changing a token whose target is masked, and which no counted position sees, changes neither the loss nor any gradient."""
    results = []
    for other in (5, 44):
        model, idx = tiny_gpt(), torch.arange(20).view(2, 10) % 61
        idx[:, -1] = other                                                  # no other position sees it
        targets = torch.cat((idx[:, 1:], idx[:, :1]), 1).masked_fill(torch.arange(10) >= 6, -1)
        loss = model(idx, targets)[1]
        loss.backward()
        results.append([loss] + [p.grad for p in model.parameters()])
        plain = torch.nn.functional.cross_entropy(model(idx)[0][:, :6].flatten(0, 1), targets[:, :6].flatten())
        assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
        rows = model(idx, targets, by_row=True)[1]
        assert rows.sum().item() == pytest.approx(-12 * loss.item(), rel=1e-5) and rows.shape == (2,)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert model(idx, torch.full_like(idx, -1))[1].item() == 0                          # all targets masked


def test_model_lora_is_small_starts_as_nothing_and_merges():
    with torch.device("meta"):
        gpt2 = model_py.GPT(config.load([os.path.join(HERE, "config", "gpt2_124m_classic.py")]).model())
        before = gpt2.estimate_flops()
        gpt2.add_lora(8)
    trained = sum(p.numel() for p in gpt2.parameters() if p.requires_grad)
    assert trained == 12 * 4 * 2 * 8 * 768 and trained / 124_439_808 < 0.01 and 0.65 < gpt2.estimate_flops() / before < 0.72
    for kw in (dict(), dict(n_kv_head=2, mlp="swiglu"), CLASSIC):
        model, idx = tiny_gpt(**kw), torch.randint(61, (2, 9))
        plain, keys = model(idx)[0], list(model.state_dict())
        model.add_lora(4)
        assert torch.equal(model(idx)[0], plain)
        optimizers = [o for kind in ("muon", "adamw") for o in model.configure_optimizers(config.Config(optimizer=kind))]
        owned = [{id(p) for g in o.param_groups for p in g["params"]} for o in optimizers]
        assert owned == 2 * [{id(p) for name, p in model.named_parameters() if "lora_" in name}] and len(owned[0]) == 2 * 4 * 2
        frozen = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
        for _ in range(3):
            model(idx, idx)[1].backward()
            optimizers[0].step()
            model.zero_grad()
        assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
        tuned = model(idx)[0]
        assert (tuned - plain).abs().max() > 1e-3
        checkpoint = dict(model=model.state_dict(), config={**vars(model.config), "lora_rank": 4})
        loaded = model_py.GPT.from_checkpoint(checkpoint)
        assert list(loaded.state_dict()) == keys and (loaded(idx)[0] - tuned).abs().max() < 1e-4
        assert type(loaded.transformer.h[0].attn.c_q) is torch.nn.Linear


def test_model_lora_learns_a_small_task():
    """LoRA on frozen random weights learns answers that depend on the first token; guessing would cost log(2) / 2 = 0.35."""
    torch.manual_seed(0)
    model = tiny_gpt(n_embd=64)
    model.add_lora(8)
    optimizers = model.configure_optimizers(config.Config(learning_rate=1e-2))
    losses = []
    for _ in range(150):
        first = torch.randint(2, (16, 1))                   # the answer depends on it
        idx = torch.cat((first, torch.full((16, 3), 7), 20 + first, 30 + first), 1)
        targets = idx[:, 1:].masked_fill(torch.arange(5) < 3, -1)
        loss = model(idx[:, :-1], targets)[1]
        loss.backward()
        for o in optimizers: o.step()
        model.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 2 and sum(losses[-10:]) / 10 < 0.1


def test_model_generate_matches_argmax_recompute_and_passes_the_context():
    model, idx = tiny_gpt(), torch.randint(61, (2, 5))
    out, expected = model.generate(idx, 20, temperature=0), idx
    for _ in range(20): expected = torch.cat((expected, model(expected)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, expected)
    fed = expected = idx
    for _ in range(60):
        if fed.shape[1] > 32: fed = expected[:, -16:]                           # past block_size: feed its newer half again
        new = model(fed)[0][:, -1].argmax(-1, keepdim=True)
        fed, expected = torch.cat((fed, new), 1), torch.cat((expected, new), 1)
    assert torch.equal(model.generate(idx, 60, temperature=0), expected)
    assert torch.equal(model.generate(idx, 9, temperature=1e-4), out[:, :14])   # nearly zero: the argmax
    a, b, c = (model.generate(idx, 9, top_k=None, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    for wrong in (dict(temperature=-1.0), dict(top_k=-1)):
        with pytest.raises(ValueError, match="must not be negative"): model.generate(idx, 9, **wrong)
    with pytest.raises(ValueError, match="nothing to continue"): model.generate(idx[:, :0], 9)


def test_model_filters_against_plain_python():
    rng = random.Random(0)
    for _ in range(200):
        V, k = rng.randint(2, 12), rng.randint(0, 12)
        top_p, min_p = rng.choice([1.0, 0.9, 0.5, 0.01]), rng.choice([0.0, 0.1, 0.9])
        logits = [rng.uniform(-4, 4) for _ in range(V)]
        keep = sorted(range(V), key=lambda i: -logits[i])[:k or V]
        exps = {i: math.exp(logits[i] / 0.7) for i in keep}
        probs, total, kept = {i: e / sum(exps.values()) for i, e in exps.items()}, 0.0, []
        for i in keep:
            if total < top_p: kept.append(i)
            total += probs[i]
        kept = [i for i in kept if probs[i] >= min_p * probs[keep[0]]]
        ours = model_py.filter_logits(torch.tensor([logits], dtype=torch.float64), 0.7, k, top_p, min_p)[0]
        assert sorted(kept) == (ours > -math.inf).nonzero().flatten().tolist()


def test_model_checkpoint_errors_and_atomic_save(tmp_path, monkeypatch):
    path = str(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="no checkpoint at"): model_py.load_checkpoint(path)
    model = tiny_gpt()
    model_py.save_checkpoint(path, dict(model=model.state_dict(), config=dataclasses.asdict(model.config)))
    model_py.save_checkpoint(str(tmp_path / "best.pt"), model_py.load_checkpoint(path))
    assert model_py.GPT.load(str(tmp_path)).config == model.config          # a run's folder: its best.pt
    with pytest.raises(AssertionError, match="a cache for 2 rows, but 1 are given"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=model_py.KVCache(model.config, 2, 8, sample_CPU, torch.float32))
    os.remove(tmp_path / "best.pt")
    assert model_py.GPT.load(str(tmp_path)).config == model.config          # or else its ckpt.pt
    again = model_py.GPT.load(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with monkeypatch.context() as m:
        m.setattr(torch, "save", raising(RuntimeError("PytorchStreamWriter failed writing file")))
        with pytest.raises(OSError, match="free space"): model_py.save_checkpoint(path, {})
    assert os.listdir(tmp_path) == ["ckpt.pt"] and model_py.load_checkpoint(path)      # the old file, and nothing beside it
    data = (tmp_path / "ckpt.pt").read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 5):
        (tmp_path / "cut.pt").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="\\): train again"): model_py.load_checkpoint(str(tmp_path / "cut.pt"))
    for damage in (bytes([data[len(data) // 2] ^ 64]), bytes(512)):     # a flipped bit, a lost block of the disk: in a tensor
        (tmp_path / "cut.pt").write_bytes(data[:len(data) // 2] + damage + data[len(data) // 2 + len(damage):])
        assert torch.load(tmp_path / "cut.pt", weights_only=True)      # which torch does not notice
        with pytest.raises(ValueError, match="damaged"): model_py.load_checkpoint(str(tmp_path / "cut.pt"))
    torch.save(dict(model=Path("x")), tmp_path / "cut.pt")          # only tensors and primitives: unpickling objects can run code
    with pytest.raises(ValueError, match="damaged"): model_py.load_checkpoint(str(tmp_path / "cut.pt"))
    for odd in (dict(config={}), dict(config=5), dict(), dict(config=vars(model.config) | dict(n_head=3))):
        os.makedirs(tmp_path / "odd", exist_ok=True)
        torch.save(dict(model={}, tokenizer=sample_TOK.to_dict()) | odd, tmp_path / "odd" / "ckpt.pt")
        with pytest.raises(ValueError, match="ckpt.pt: not a checkpoint of this project"):
            model_py.GPT.load(str(tmp_path / "odd" / "ckpt.pt"))
        with pytest.raises(ValueError, match="ckpt.pt: not a checkpoint of this project"):
            sample.load(config.Config(out_dir=str(tmp_path / "odd"), rope_scaling="ntk", rope_factor=2.0))


# ---- Hugging Face folders

HF_COMMON = dict(vocab_size=61, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
HF_SIZES = dict(HF_COMMON, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=56, max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16, rope_theta=500.0)
HF_MODELS = {
    "gpt2": ("GPT2", dict(HF_COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "gpt2 untied": ("GPT2", dict(HF_COMMON, n_embd=24, n_layer=2, n_head=2, n_inner=40, n_positions=64, layer_norm_epsilon=1e-3,
                                 tie_word_embeddings=False)),
    "llama": ("Llama", dict(HF_SIZES, num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama gqa tied": ("Llama", dict(HF_SIZES, tie_word_embeddings=True)),
    "llama3": ("Llama", dict(HF_SIZES, rope_parameters=LLAMA3, head_dim=16)),
    "llama linear": ("Llama", dict(HF_SIZES, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "llama biases": ("Llama", dict(HF_SIZES, attention_bias=True, mlp_bias=True)),
    "qwen3": ("Qwen3", dict(HF_SIZES, head_dim=12)),
    "qwen3 tied": ("Qwen3", dict(HF_SIZES, head_dim=16, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "qwen3 windows": ("Qwen3", dict(HF_SIZES, use_sliding_window=True, sliding_window=5, layer_types=[
        "sliding_attention", "full_attention", "full_attention"])),
}
OUR_MODELS = {
    "classic": CLASSIC,
    "classic without biases": dict(CLASSIC, bias=False, norm_eps=1e-4),
    "classic untied": dict(CLASSIC, tie_weights=False),
    "modern": dict(n_kv_head=2),
    "modern tied": dict(tie_weights=True, zero_init=False, head_size=12, n_inner=72),
    "swiglu": dict(mlp="swiglu", n_kv_head=1),
    "llama": dict(qk_norm=False, mlp="swiglu", bias=True, rope_scaling="llama3", rope_factor=4.0),
    "relu2": dict(qk_norm=False, bias=True),
    "linear": dict(rope_scaling="linear", rope_factor=2.0, norm_gain=True),
    "trained shorter": dict(rope_scaling="llama3", rope_factor=4.0, rope_trained=6),
    "windows": dict(n_layer=4, window_pattern="SL", window=3)}


def hf_made(name, **changes):
    """The transformers model of that name with every weight random, gains and biases included."""
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    kind, kw = HF_MODELS[name]
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**{**kw, **changes})).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1: p.add_(torch.randn_like(p) * 0.3)
    return theirs


def hf_same(ours, theirs):
    """Logits agree to 1e-4 on random ids, and both generate the same greedy text through their own caches."""
    idx = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    new = min(50, ours.config.block_size - 14)
    mask = torch.ones_like(idx)
    theirs = theirs.generate(idx, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert theirs.shape[1] == 14 + new and torch.equal(ours.generate(idx, new, temperature=0), theirs)


@pytest.mark.parametrize("name, part", [("llama", "attention_bias"), ("llama", "mlp_bias"), ("qwen3", "attention_bias")])
def test_model_with_biases_in_one_part_peer(name, part, tmp_path):
    """Here a model has biases everywhere or nowhere: zeros stand for those that the file has not."""
    theirs = hf_made(name, **{part: True})
    theirs.save_pretrained(tmp_path / "one")
    hf_same(ours := model_py.GPT.load(str(tmp_path / "one")), theirs)
    os.mkdir(tmp_path / "back")
    if name == "qwen3":
        with pytest.raises(ValueError, match="qwen3 does not support bias=True"): model_py.save_hf(ours, str(tmp_path / "back"))
        return
    model_py.save_hf(ours, str(tmp_path / "back"))
    hf_same(ours, type(theirs).from_pretrained(tmp_path / "back").eval())


@pytest.mark.parametrize("name", HF_MODELS)
def test_model_from_transformers_peer(name, tmp_path):
    """Their folder, in one file, shards or an older format, loads as the same model; exported again, it has the same tensors."""
    theirs = hf_made(name)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ours = model_py.GPT.load(str(tmp_path / "one"))
    hf_same(ours, theirs)
    assert ours.num_params() == sum(p.numel() for p in theirs.parameters())
    many = model_py.load_hf(str(tmp_path / "many"), dtype=torch.bfloat16)
    for a, b in zip(ours.parameters(), many.parameters(), strict=True): assert torch.equal(a.bfloat16(), b) and b.is_contiguous()
    os.mkdir(tmp_path / "back")
    model_py.save_hf(ours, str(tmp_path / "back"))
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    for (a, x), (b, y) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert a == b and torch.equal(x, y), a
    # Older formats: transformers 4 wrote rope_theta and rope_scaling; GPT-2's own file has no prefix but stores the causal masks
    path = tmp_path / "one" / "config.json"
    d = json.loads(path.read_text())
    if rope := d.pop("rope_parameters", None):
        d |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope if rope["rope_type"] != "default" else None)
        path.write_text(json.dumps(d))
    else:
        from safetensors.torch import load_file, save_file
        file = str(path.parent / "model.safetensors")
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
        save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, file)
    old = model_py.GPT.load(str(path.parent))
    assert old.config == ours.config and all(map(torch.equal, old.parameters(), ours.parameters()))


@pytest.mark.parametrize("name", OUR_MODELS)
def test_model_to_transformers_peer(name, tmp_path):
    """Our export loads in transformers, and here again, with the same logits and greedy text."""
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    ours = tiny_gpt(noise=0.3, **{"block_size": 64, **OUR_MODELS[name]}).requires_grad_(False)
    model_py.save_hf(ours, str(tmp_path), end=5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    hf_same(ours, theirs)
    assert theirs.generation_config.eos_token_id == 5
    again, idx = model_py.GPT.load(str(tmp_path)), torch.randint(61, (2, 9))
    torch.testing.assert_close(again(idx)[0], ours(idx)[0], atol=1e-5, rtol=1e-5)
    assert again.config.mlp == ours.config.mlp


@pytest.mark.parametrize("kw, named", [
    (dict(logit_softcap=15.0), "logit_softcap=15.0"), (dict(pos="sinusoidal"), "pos='sinusoidal'"),
    (dict(mlp="gelu"), "mlp='gelu'"), (dict(norm="layernorm"), "norm='layernorm'"), (dict(bias=True), "bias=True"),
    (dict(CLASSIC, mlp="relu2"), "mlp='relu2'"), (dict(CLASSIC, n_kv_head=2), "n_kv_head=2"),
    (dict(CLASSIC, qk_norm=True), "qk_norm=True"), (dict(n_embd=34, head_size=8, qk_norm=False), "n_embd=34"),
    (dict(rope_scaling="yarn", rope_factor=2.0), "rope_scaling='yarn'"),
    (dict(CLASSIC, n_head=3, n_kv_head=0, head_size=8), "gpt2 cannot have this shape"),
    (dict(rope_scaling="llama3", rope_factor=3.0), "block_size / rope_factor = 10.66"),
    (dict(qk_norm=False, window_pattern="SL", window=3), "layer_types=['sliding_attention', 'full_attention']")])
def test_model_export_refuses_by_name_peer(kw, named, tmp_path):
    pytest.importorskip("safetensors", reason="not installed: pip install safetensors")
    with pytest.raises(ValueError, match="export: .*" + re.escape(named)) as e: model_py.save_hf(tiny_gpt(**kw), str(tmp_path))
    assert "\n" not in str(e.value) and not os.listdir(tmp_path)


def hf_shards(index):
    """Replaces the file by part-2.safetensors, which holds a third of it, and this index."""
    def cut(path):
        from safetensors.torch import load_file, save_file
        save_file(dict(list(load_file(path).items())[:9]), str(path.parent / "part-2.safetensors"))
        (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
        path.unlink()
    return cut


HF_BAD = {      # name: (changes to config.json, or a file and what is done to it, what the error must say)
    "architecture": (dict(model_type="bloom"), "model_type='bloom', not in ('gpt2', 'llama', 'qwen3')"),
    "no architecture": (dict(model_type=None), "has no entry 'model_type'"),
    "activation": (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    "window": (dict(use_sliding_window=True), "layer_types=['sliding_attention']"),
    "window in the last layer": (dict(model_type="qwen3", layer_types=["sliding_attention"] * 3), "layer_types=['sliding_attention',"),
    "window without a switch": (dict(model_type="qwen3", sliding_window=4, layer_types=["sliding_attention"] + 2 * ["full_attention"]),
                                "layer_types=['sliding_attention', 'full_attention', 'full_attention']"),
    "too few layer types": (dict(layer_types=["full_attention"]), "layer_types=['full_attention']"),
    "layer types": (dict(layer_types=["sliding_attention", "full_attention"]), "layer_types=['sliding_attention', 'full_attention']"),
    "biases": (dict(attention_bias=True), "lacks 12 tensors, such as model.layers.0.self_attn.k_proj.bias"),
    "both biases": (dict(attention_bias=True, mlp_bias=True), "lacks 21 tensors, such as model.layers.0.mlp.down_proj.bias"),
    "rotary": (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "quantised": (dict(quantization_config={"bits": 4}), "quantization_config="),
    "yarn": (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type='yarn'"),
    "dynamic": (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "'dynamic'"),
    "rope factors": (dict(rope_scaling=dict(LLAMA3, high_freq_factor=2.0)), "high_freq_factor=2.0"),
    "shrinking": (dict(rope_scaling=dict(rope_type="linear", factor=0.5)), "rope_factor=0.5"),
    "no width": (dict(hidden_size=None), "has no entry 'hidden_size'"),
    "odd width": (dict(hidden_size="32"), "config.json: "),
    "heads": (dict(num_key_value_heads=3), "not divisible by n_kv_head=3"),
    "wrong shape": (dict(intermediate_size=48),
                    "safetensors: model.layers.0.mlp.down_proj.weight has the shape [32, 56], but config.json asks for [32, 48]"),
    "missing": (dict(num_hidden_layers=4), "lacks 9 tensors, such as model.layers.3.input_layernorm.weight"),
    "extra": (dict(num_hidden_layers=2), "has model.layers.2.input_layernorm.weight, which is no part of the model"),
    "tied": (dict(tie_word_embeddings=True), "model.embed_tokens.weight differs from its twin: tied weights must be equal"),
    "gate": (dict(hidden_act="relu"), "model.layers.0.mlp.up_proj.weight differs from its twin"),
    "no config": ("config.json", lambda p: p.unlink(), "config.json is missing"),
    "bad config": ("config.json", lambda p: p.write_text("{"), "config.json: Expecting"),
    "no factor": (dict(rope_scaling=dict(rope_type="linear")), "has no entry 'factor'"),
    "no weights": ("model.safetensors", lambda p: p.unlink(), "model.safetensors is missing"),
    "header": ("model.safetensors", lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "model.safetensors is damaged"),
    "header text": ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:8] + b"x" + p.read_bytes()[9:]),
                    "model.safetensors is damaged"),
    "cut": ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9]), "model.safetensors is damaged"),
    "shard": ("model.safetensors", hf_shards(dict(weight_map=dict(a="part-1.safetensors", b="part-2.safetensors"))),
              "part-1.safetensors is missing: download"),
    "index": ("model.safetensors", hf_shards(dict(weight_map=[3])), "model.safetensors.index.json: "),
    "no map": ("model.safetensors", hf_shards({}), "model.safetensors.index.json: 'weight_map'"),
    "too few": ("model.safetensors", hf_shards(dict(weight_map=dict(b="part-2.safetensors"))), "lacks 21 tensors, such as "),
    "int8": ("model.safetensors", lambda p: importlib.import_module("safetensors.torch").save_file(
        {"lm_head.weight": torch.ones(2, dtype=torch.int8)}, p), "lm_head.weight is quantised (torch.int8): use")}


def rewrite_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    hf_made("llama").save_pretrained(folder := tmp_path_factory.mktemp("hf"))
    return folder


@pytest.mark.parametrize("name", HF_BAD)
def test_model_folder_errors_peer(name, hf_folder, tmp_path):
    """Each error is one line that names the folder and what is wrong with it."""
    bad, folder = HF_BAD[name], tmp_path / "hf"
    shutil.copytree(hf_folder, folder)
    if len(bad) == 3: bad[1](folder / bad[0])
    else: rewrite_json(folder / "config.json", rope_parameters=None, **bad[0])
    with pytest.raises(ValueError) as e: model_py.GPT.load(str(folder))
    assert bad[-1] in str(e.value) and str(folder) in str(e.value) and "\n" not in str(e.value)


def test_model_folder_of_gpt2_with_fewer_positions_than_its_file_peer(tmp_path):
    hf_made("gpt2").save_pretrained(tmp_path)
    rewrite_json(tmp_path / "config.json", n_positions=20)
    with pytest.raises(ValueError, match=r"transformer.wpe.weight has the shape \[64, 32\], but config.json asks for \[20, 32\]"):
        model_py.GPT.load(str(tmp_path))


def test_model_folder_never_holds_its_weights_twice_peer(hf_folder, monkeypatch):
    alive, real = [], model_py.hf_tensors
    def watched(folder):
        for path, key, t in real(folder):
            alive.append(weakref.ref(t))
            assert sum(ref() is not None for ref in alive) <= 2, key
            yield path, key, t
    monkeypatch.setattr(model_py, "hf_tensors", watched)
    model = model_py.GPT.load(str(hf_folder))
    assert len(alive) == len(model.state_dict()) and sum(ref() is not None for ref in alive) == 0


def test_model_export_copies_no_matrix_that_it_need_not_peer(tmp_path, monkeypatch):
    st = pytest.importorskip("safetensors.torch", reason="not installed: pip install safetensors")
    model, saved = tiny_gpt(mlp="swiglu", norm_gain=True), {}
    monkeypatch.setattr(st, "save_file", lambda tensors, *args, **kw: saved.update(tensors))
    model_py.save_hf(model, str(tmp_path))
    assert {t.data_ptr() for t in saved.values()} == {p.data_ptr() for p in model.parameters()}


PUBLISHED = {       # parameters by the model card, config.json from the hub
    "llama 3.1 8B": (8_030_261_248, """{
        "attention_bias": false, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
        "vocab_size": 128256}"""),
    "qwen3 0.6B": (596_049_920, """{
        "attention_bias": false, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936}""")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_published_configs_have_their_published_sizes(name, tmp_path):
    size, said = PUBLISHED[name]
    (tmp_path / "config.json").write_text(said)
    shape = model_py.hf_config(str(tmp_path))[1]
    with torch.device("meta"): assert model_py.GPT(shape).num_params() == size
    assert (shape.rope_scaling, shape.trained_length) == (("llama3", 8192) if "8B" in name else ("none", 40960))


def test_model_folder_needs_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    said = dict(model_type="gpt2", n_positions=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4, layer_norm_epsilon=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(said))
    for use in (lambda: model_py.GPT.load(str(tmp_path)), lambda: model_py.save_hf(tiny_gpt(), str(tmp_path))):
        with pytest.raises(ValueError, match="pip install safetensors"): use()


# ======================================================== bpe.py: a naive BPE; tiktoken, tokenizers, rustbpe

BPE_GPT2 = os.path.join(HERE, "..", "shared", "data", "gpt2")
BPE_PATTERNS = [GPT2_SPLIT, GPT4_SPLIT, CL100K_SPLIT]
BPE_BYTES = {bytes([i]): i for i in range(256)}


def bpe_split(text, pattern):
    """The words of a byte string as bpe.py splits them."""
    raw, starts, lens, _ = bpe.split([text], pattern)
    return [raw[i:i + n] for i, n in zip(starts.tolist(), lens.tolist())]


def bpe_engine_split(text, pattern, guess):
    """The words of a str as tiktoken's engine splits them. The engine returns tokens, and a word that is a token stays whole: so
    every word of `guess` is made a token and, so that a boundary only in `guess` would show, every two neighbours joined."""
    ranks = dict(BPE_BYTES)
    for word in [*guess, *(a + b for a, b in zip(guess, guess[1:]))]: ranks.setdefault(word, len(ranks))
    engine = tiktoken.Encoding("split", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return engine.decode_tokens_bytes(engine.encode_ordinary(text))


def bpe_naive_train(words, n_merges):
    """The textbook algorithm, one merge at a time in plain dicts: the most frequent pair, then the smallest. words: {bytes: count}.
    Counts are updated, not recounted: fast enough for thousands of merges."""
    seqs, counts, pairs, where, merges = [list(w) for w in words], list(words.values()), Counter(), {}, []
    for i, (s, k) in enumerate(zip(seqs, counts)):
        for p in zip(s, s[1:]):
            pairs[p] += k
            where.setdefault(p, set()).add(i)
    for new in range(256, 256 + n_merges):
        best = min(pairs, key=lambda p: (-pairs[p], p), default=None)
        if not best: break
        merges.append(best)
        for i in where.pop(best):
            s, k, out, j = seqs[i], counts[i], [], 0
            while j < len(s):
                pair = tuple(s[j:j + 2]) == best
                out.append(new if pair else s[j])
                j += 2 if pair else 1
            for p in zip(s, s[1:]):
                pairs[p] -= k
                if not pairs[p]: del pairs[p]
            for p in zip(out, out[1:]):
                pairs[p] += k
                where.setdefault(p, set()).add(i)
            seqs[i] = out
    return merges


def bpe_naive_encode(word, merges):
    """Apply each merge in the order it was learned, left to right."""
    ids = list(word)
    for new, pair in enumerate(merges, 256):
        for i in range(len(ids)):
            if tuple(ids[i:i + 2]) == pair: ids[i:i + 2] = [new]
    return ids


def bpe_counts(texts, pattern):
    return Counter(w for text in texts for w in bpe_split(text.encode() if isinstance(text, str) else text, pattern))


BPE_CHARS = ["a", "b", "e", "l", "r", "s", "t", "v", "L", "S", "Z", "'", "'", " ", " ", " ", "\n", "\r", "\t", "\x0b", "\x1c",
             "0", "7", ".", "(", "-", "\x00", "é", "ß", "ſ", "\u0301", "\x85", "\xa0", "\u2003", "\u2028", "\u3000",
             "中", "文", "。", "½", "٣", "😀", "\U0001d7d8", "\ufeff", "\U0010ffff",
             "'s", "'LL", "'ve", "'ſ", "123456", "  \n ", "!\n\n", "\r\n"]


def bpe_stdlib_text(*names):
    """Source files of Python's standard library, concatenated."""
    folder = Path(random.__file__).parent
    return "".join(open(folder / name, newline="", encoding="utf-8").read() for name in names)


def bpe_random_text(rng, n):
    chars = rng.sample(BPE_CHARS, rng.randint(1, len(BPE_CHARS))) if rng.random() < 0.7 else BPE_CHARS
    return "".join(rng.choice(chars) * (rng.randint(1, 12) if rng.random() < 0.1 else 1) for _ in range(n))


def bpe_random_bytes(rng, n):
    pools = [range(256), [0x61, 0x20, 0xC3, 0xA9, 0xE4, 0xB8, 0xAD, 0xFF], [0x80, 0xE2, 0x61, 0x27, 0x73, 0xC2, 0xA0], [97, 98]]
    return bytes(rng.choices(rng.choice(pools), k=n))


@pytest.mark.parametrize("pattern", BPE_PATTERNS, ids=["gpt2", "gpt4", "cl100k"])
def test_bpe_split_equals_tiktoken_engine(pattern):
    rng = random.Random(1)
    texts = [bpe_random_text(rng, rng.randint(0, 60)) for _ in range(800)]
    texts += ["", " ", "  ", "\n", " \n", "\n ", "a ", "a  ", "\u3000x", "\u3000\u3000x"]
    texts += ["'", "'s", "''s", " 's", "'st", "x'll've'", "a'", "'l", "1'd2"]
    for text in texts:
        ours = bpe_split(text.encode(), pattern)
        assert b"".join(ours) == text.encode()
        assert ours == bpe_engine_split(text, pattern, ours), repr(text)


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, GPT4_SPLIT], ids=["gpt2", "gpt4"])
def test_bpe_split_every_code_point(pattern):
    points = [*range(0xD800), *range(0xE000, 0x20000, 5), 0x10FFFF]
    table = bpe.classes(np.arange(0x110000))
    rare = [c for c in range(0x20000, 0x110000) if table[c] != table[c - 1]]   # beyond 0x20000, only where the class changes
    text = "".join(f"a{chr(c)}'{chr(c)} {chr(c)}" for c in points + rare)
    ours = bpe_split(text.encode(), pattern)
    assert ours == bpe_engine_split(text, pattern, ours)


def bpe_random_corpus(rng):
    """Few words over few symbols, for many ties; runs of one symbol, for pairs like (a, a); adversarial text and bytes."""
    kind = rng.random()
    if kind < 0.4:
        letters = "ab" if rng.random() < 0.5 else "abcdeé中"
        word = lambda: "".join(rng.choices(letters, k=rng.randint(1, 9)))
        return [" ".join(word() for _ in range(rng.randint(1, 25))) for _ in range(rng.randint(1, 4))]
    if kind < 0.6: return [" ".join(rng.choice("ab") * rng.randint(1, 30) for _ in range(rng.randint(1, 12)))]
    if kind < 0.8: return [bpe_random_bytes(rng, rng.randint(0, 80)) for _ in range(rng.randint(1, 5))]
    return ["", bpe_random_text(rng, rng.randint(0, 80)), ""]


def test_bpe_train_equals_naive_and_encode_equals_tiktoken(monkeypatch):
    rng = random.Random(2)
    for trial in range(1000):
        monkeypatch.setattr(bpe, "LONG", rng.choice([256, 256, 2]))   # 2: nearly every word takes the path for long words
        monkeypatch.setattr(bpe, "HOT", rng.choice([1024, 3]))
        pattern, docs, n = rng.choice(BPE_PATTERNS), bpe_random_corpus(rng), rng.randint(0, 40)
        tok = Tokenizer.train(docs, 256 + n, pattern, special_tokens=(), workers=1)
        assert tok.merges == bpe_naive_train(bpe_counts(docs, pattern), n), (trial, docs, pattern)
        engine = tok.to_tiktoken()
        more = [d for d in docs if isinstance(d, str)] + [bpe_random_text(rng, 30), "".join(rng.choices("ab \n", k=80))]
        for text, ids in zip(more, tok.encode_batch(more)):
            assert tok.encode(text) == ids.tolist() == engine.encode_ordinary(text), (trial, text)
            assert ids.tolist() == [i for word in bpe_split(text.encode(), pattern) for i in bpe_naive_encode(word, tok.merges)]
            assert tok.decode(ids) == text
        for data in docs + [bpe_random_bytes(rng, 40)]:
            data = data.encode() if isinstance(data, str) else data
            assert tok.decode_bytes(tok.encode(data)) == data


@pytest.mark.parametrize("kind", ["code", "ties"])
def test_bpe_batched_merging_equals_one_at_a_time(kind):
    """Thousands of merges make large batches; in random bytes more pairs tie than the trainer considers at a time."""
    if kind == "code": text = bpe_stdlib_text("argparse.py", "typing.py", "decimal.py").encode()
    else: text = b" ".join(bytes(random.Random(i).choices(range(128, 256), k=9)) for i in range(800))
    tok = Tokenizer.train([text], 3000, special_tokens=(), workers=1)
    assert tok.merges == bpe_naive_train(bpe_counts([text], GPT2_SPLIT), 3000 - 256)


def test_bpe_counts_beyond_32_bits():
    """learn_merges takes words with their counts, so no large text is needed for large counts."""
    words = {b"abcd": 2 ** 40, b"ab": 1, b"xy": 2 ** 40 + 1}
    assert bpe.learn_merges(words, 2) == [(ord("a"), ord("b")), (ord("x"), ord("y"))]
    words[b"xy"] += 1
    assert bpe.learn_merges(words, 1) == [(ord("x"), ord("y"))]


def test_bpe_chunk_boundaries_everywhere(monkeypatch):
    """Ids and merges do not depend on where chunks end or on the parts in which a text arrives."""
    rng = random.Random(3)
    texts = [bpe_random_text(rng, rng.randint(0, 120)) for _ in range(25)]
    texts += ["中文" * 60, "中。文," * 30, "a" * 300, " " * 200, "é " * 50]
    texts = [t.encode() for t in texts] + [bpe_random_bytes(rng, rng.randint(0, 150)) for _ in range(25)]
    toks = [Tokenizer.train(texts, 400, p, special_tokens=(), workers=1) for p in BPE_PATTERNS]
    whole = [[a.tolist() for a in tok.encode_batch(texts)] for tok in toks]
    for size in (1, 7, 33):
        monkeypatch.setattr(bpe, "CHUNK", size)
        for tok, expect in zip(toks, whole):
            tok = Tokenizer.from_dict(tok.to_dict())
            assert [a.tolist() for a in tok.encode_batch(texts)] == expect
            if size == 7:
                for text, ids in zip(texts, expect):
                    parts = [text[i:i + 3] for i in range(0, len(text), 3)]
                    assert list(tok.encode_iterable(parts)) == ids
                    assert b"".join(bpe.cut(parts)) == text
            assert Tokenizer.train(texts, 400, tok.pattern, special_tokens=(), workers=1).merges == tok.merges


def test_bpe_cuts_text_only_between_words():
    """Wherever last_place may cut a text, the two sides encode to the ids of the whole, in every pattern, with or without NFC."""
    r, places = random.Random(0), 0
    parts = ["\u0958", "'", "a", "don't", "I'll", "'s", "42", "1234", ".", "!?", "\n", "\r\n", "\n\n", " ", "  ", "\t",
             "\u00a0", "\u3000", "\u2028", "\u2003", "\u200d", "\u2126", "\u00e9", "e\u0301", "\u0434\u0430", "\u6771\u4eac", "\u3002", "\u3042", "\ud55c",
             "\U0001f600", "\ufeff", "\u0929", "\u0915\u093f", "\u0bb4\u0bcd", "\u0e01\u0e33", "\u0f43", "\u10d0", "\u1f71"]
    parts += 4 * [" ", "\n"]
    text = "".join(r.choice(parts) for _ in range(6000)).encode()
    text = b"".join(text[i:i + 50] + r.choice([b"", b"\xff", b"\xc3", b"\xe4\xb8", b"\xe3\x80"]) for i in range(0, len(text), 50))
    merges = Tokenizer.train([text], 700).merges
    toks = [Tokenizer(merges, pattern) for pattern in (GPT2_SPLIT, GPT4_SPLIT, CL100K_SPLIT, bpe.QWEN_SPLIT)]
    for i in range(0, len(text), 200):
        piece = text[i:i + 200]
        windows = [(at, bpe.last_place(piece[at:end])) for at in range(0, 190, 9) for end in range(at + 5, 200, 11)]
        cuts = [(piece[:place], piece[place:]) for place in {at + found for at, found in windows if found}]
        normal = [(bpe.nfc(left), bpe.nfc(right)) for left, right in cuts]
        assert {left + right for left, right in normal} == {bpe.nfc(piece)}
        for tok, (sides, whole) in itertools.product(toks, ((cuts, piece), (normal, bpe.nfc(piece)))):
            expect, ids = tok.encode(whole), tok.encode_batch(itertools.chain(*sides))
            for (left, right), a, b in zip(sides, ids[::2], ids[1::2], strict=True):
                assert [*a, *b] == expect, (tok.pattern, left, right)
        places += len(cuts)
    assert places > 1000
    words = [word for piece in bpe.cut([40 * text]) for word in bpe_split(piece, GPT2_SPLIT)]      # pieces of CHUNK bytes
    assert words == bpe_split(40 * text, GPT2_SPLIT)
    for letter in "w\u0441\u0930\u0bb4\u0e04\u10d2\u4e00":     # a list of words, one per line: Latin, Cyrillic, Hindi, Tamil, Thai, Georgian
        for between in "\n \u2003\u2028\u3000":
            assert bpe.last_place((4 * letter + between + letter).encode()) == len((4 * letter).encode())


def test_bpe_workers_agree(monkeypatch):
    rng = random.Random(4)
    docs = [bpe_random_text(rng, 300) for _ in range(200)]
    monkeypatch.setattr(bpe, "BATCH", 5000)
    assert Tokenizer.train(docs, 500, workers=2).hash == Tokenizer.train(iter(docs), 500, workers=1).hash


def test_bpe_numbers_of_words_whose_slots_collide(monkeypatch):
    """With few slots for many words, each word still gets one number and keeps it."""
    rng = random.Random(0)
    monkeypatch.setattr(bpe, "SLOTS", 4)
    parts = [[bytes(rng.choices(range(33, 127), k=rng.randint(1, 20))) for _ in range(1000)] * 2 for _ in range(3)]
    words = bpe.Words()
    for part in (*parts, parts[0][::-1]):
        lens = np.array(list(map(len, part)))
        numbers = words.number(b"".join(part), np.cumsum(lens) - lens, lens)
        assert numbers.tolist() == [words[word] for word in part]
    assert list(words.values()) == list(range(len({word for part in parts for word in part})))


def test_bpe_long_words_that_differ_in_length_and_one_letter():
    """A long word's hash mixes its length and every letter: a change in one must not cancel a change in the other."""
    words = [bytes([a]) + b"." * n + bytes(z) for a in range(33, 48) for n in range(7, 24) for z in range(1, 4)]
    raw, lens = b"".join(words), np.array(list(map(len, words)))
    assert len(set(bpe.word_keys(raw, np.cumsum(lens) - lens, lens).tolist())) == len(set(words))


def test_bpe_cache_is_bounded(monkeypatch):
    tok = Tokenizer.train(["the cat sat on the mat " * 5], 280, workers=1)
    texts = [" ".join(str(i * j) for i in range(50)) for j in range(40)]
    texts += [str(i) * 60 for i in range(60)]               # few words, but of many ids each
    expect, sizes = [tok.encode(t) for t in texts], []
    assert {b" 20", b"5" * 60} <= {*tok._cache[0]}         # of the first text and of another
    monkeypatch.setattr(bpe, "CACHE", 130)
    for text, ids in zip(texts, expect):
        assert tok.encode(text) == ids
        sizes.append([len(part) for part in vars(tok).get("_cache", [(), (), ()])])
    words, _, ids = map(max, zip(*sizes))
    assert 0 < words <= 130 and 0 < ids <= 8 * 130


def test_bpe_threads_do_not_disturb_each_other(monkeypatch):
    """What another thread may do in the middle of a step is done here by a call from inside of it."""
    code, encode, inside = np.array([0xE9, 0x4E2D, 0x663, 0x3000, 0x2026]), tiktoken.Encoding.encode_ordinary, []
    expect = bpe.classes(code).tolist()
    monkeypatch.setattr(bpe, "CLASS", np.where(np.arange(len(bpe.CLASS)) < 128, bpe.CLASS, bpe.UNKNOWN).astype(np.uint8))
    bpe.CLASS[0xD800:0xE000] = bpe.OTHER
    def encode_ordinary(engine, text):
        if not inside: inside.append("once") or inside.append(bpe.classes(code).tolist())   # the table is being filled
        return encode(engine, text)
    monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary", encode_ordinary)
    assert [bpe.classes(code).tolist(), inside[1]] == [expect, expect]

    tok, text, other = Tokenizer.train(["the cat sat on the mat " * 5], 268, workers=1), "a mat sat", "on the cat, the mat"
    class Words(bpe.Words):
        def __len__(self):
            if armed: inside[:] = armed.pop(), tok.encode(other)            # the cache has just been read
            return super().__len__()
    monkeypatch.setattr(bpe, "Words", Words)
    armed = []
    expect = [Tokenizer(tok.merges).encode(t) for t in (text, other)]
    tok.encode("the")                                                       # makes a cache
    armed.append(None)
    assert [tok.encode(text), inside[1]] == expect and not armed


def test_bpe_cache_survives_interrupts_and_two_texts_at_once(monkeypatch):
    monkeypatch.setattr(bpe, "CHUNK", 16)
    monkeypatch.setattr(bpe, "CACHE", 100)
    tok = Tokenizer.train(["the cat sat on the mat " * 5], 280, workers=1)
    texts = [" ".join(str(i * j) for i in range(200)) for j in (3, 7)]
    expect = [Tokenizer(tok.merges).encode(t) for t in texts]
    assert list(map(list, zip(*zip(tok.encode_iterable([texts[0]]), tok.encode_iterable([texts[1]]))))) == [
        ids[:min(map(len, expect))] for ids in expect]
    for owner, name in ((Tokenizer, "_merge"), (bpe, "word_keys")):
        with monkeypatch.context() as m:
            m.setattr(owner, name, raising(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt): tok.encode(texts[1])
        assert [tok.encode(t) for t in texts] == expect


@pytest.mark.parametrize("kind", ["one letter", "random letters", "spaces", "cjk", "digits"])
def test_bpe_megabyte_words(kind):
    """One word as long as the text can be trained on and encoded, at about the cost per letter of short words."""
    rng = random.Random(5)
    n = 1_000_000
    text = {"one letter": "a" * n, "random letters": "".join(rng.choices("abcdefgh", k=n // 4)), "spaces": " " * n,
            "digits": "7" * n, "cjk": "".join(rng.choices("中文字母", k=n // 12))}[kind]
    tok = Tokenizer.train([text], 320, special_tokens=(), workers=1)
    def seconds(text):
        """CPU time of this process, so that other load does not count: the best of three runs, each with an empty word cache."""
        found = []
        for fresh in [Tokenizer(tok.merges) for _ in range(3)]:
            began = time.process_time()
            fresh.encode(text)
            found.append(time.process_time() - began)
        return min(found)
    part, words = text[:60_000], "".join(rng.choices("abcdefgh ", k=60_000))
    assert seconds(part) < 60 * seconds(words), "a long word must not take quadratic time"      # quadratic: 300 times
    assert tok.decode(tok.encode(text[:-1])) == text[:-1]       # shorter, as the whole may be one token
    short = text[:20_000]
    assert tok.encode(short) == tok.to_tiktoken().encode_ordinary(short)


def test_bpe_special_tokens():
    text = "a<|endoftext|>b <|x|> c<|endoftext|>"
    tok = Tokenizer.train(["abc abc", text], 262, special_tokens=("<|endoftext|>", "<|x|>"))
    assert tok.special_tokens == {"<|endoftext|>": tok.vocab_size - 2, "<|x|>": tok.vocab_size - 1}
    assert tok.encode(text) == tok.to_tiktoken().encode_ordinary(text)
    assert max(tok.encode(text)) < tok.vocab_size - 2
    for allowed in ({"<|x|>"}, {"<|endoftext|>"}, {"<|x|>", "<|endoftext|>"}):
        assert tok.encode(text, allowed) == tok.to_tiktoken().encode(text, allowed_special=allowed, disallowed_special=())
    assert tok.encode(text, "all") == tok.encode(text, ["<|x|>", "<|endoftext|>"]) == tok.encode(text.encode(), "all")
    assert tok.decode(tok.encode(text, "all")) == text
    with pytest.raises(ValueError, match=re.escape("allowed_special has '<|y|>', which is not one of")):
        tok.encode(text, ["<|y|>"])
    with pytest.raises(ValueError, match="want \"all\" or a list"): tok.encode(text, "<|x|>")
    with pytest.raises(ValueError, match="want a list of texts"): Tokenizer.train(["abc abc", text], 262, special_tokens="<|x|>")
    with pytest.raises(TypeError): tok.encode(5)                # bytes(5) would be five zeros
    with pytest.raises(TypeError): list(tok.encode_iterable(b"abc"))
    tok = Tokenizer([], special_tokens=("<a>", "<a>b"))         # of two with a common beginning, the longer matches
    assert tok.encode("<a>b<a>", "all") == [257, 256]


def test_bpe_ids_past_16_bits_are_whole():
    """A vocabulary with a gap before its last id, which does not fit uint16."""
    tok = Tokenizer([], tokens=BPE_BYTES | {b"ab": 70000})
    assert tok.vocab_size == 70001 and tok.encode("cab") == [99, 70000] and tok.encode_batch(["ab"])[0].dtype == np.uint32


def test_bpe_special_tokens_part_the_training_text():
    rng = random.Random(8)
    parts = [bpe_random_text(rng, 40) for _ in range(100)]
    for special in ("<|endoftext|>", "<s p a c e>"):
        joined = special.join(parts)
        tok = Tokenizer.train([joined], 330, special_tokens=(special,))
        assert tok.merges == Tokenizer.train(parts, 330, special_tokens=(special,)).merges
        assert tok.merges != Tokenizer.train([joined], 329, special_tokens=()).merges
        assert tok.encode(joined, [special]) == tok.to_tiktoken().encode(joined, allowed_special="all")


def test_bpe_vocab_size_and_byte_tokenizer(capsys):
    tok = Tokenizer.train(["hello"], 256)
    assert tok.merges == [] and tok.vocab_size == 256 and tok.encode("hé") == list("hé".encode())
    assert Tokenizer.train(["hello"], 256, special_tokens=()).hash == tok.hash
    with pytest.raises(ValueError, match="need 257"): Tokenizer.train(["hello"], 256, special_tokens=["<a>"])
    assert Tokenizer.train(["hello hello"], 259).vocab_size == 259
    capsys.readouterr()
    assert len(Tokenizer.train(["ab ab"], 1000).merges) == 2   # "ab" and " ab"
    assert "only 2 pairs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="256"): Tokenizer.train(["hello"], 255)
    with pytest.raises(ValueError, match="pattern"): Tokenizer.train(["hello"], 300, pattern=r"\w+")
    with pytest.raises(ValueError, match="need 259"): Tokenizer.train(["hello"], 257, special_tokens="a|b|c".split("|"))
    with pytest.raises(ValueError, match="workers is -1"): Tokenizer.train(["hello"], 300, workers=-1)
    for size in ("400", 400.0):
        with pytest.raises(ValueError, match=f"vocab_size is {size!r}: give an int"): Tokenizer.train(["hello"], size)
    assert tok.encode("") == [] and tok.decode([]) == "" and [len(a) for a in tok.encode_batch(["", "a", ""])] == [0, 1, 0]
    assert tok.encode_batch([]) == [] and tok.encode_batch(["a"])[0].dtype == np.uint16


def test_bpe_kinds_of_text():
    """bytearray and memoryview are texts, too; a row of a table, or one text where a list is wanted, is refused."""
    text = b"the cat<|endoftext|>sat on the mat"
    expect = Tokenizer.train([text], 265)
    for kind in (bytes.decode, bytearray, memoryview):
        assert Tokenizer.train([kind(text)], 265).hash == Tokenizer.train(kind(text), 265).hash == expect.hash
        assert expect.encode(kind(text)) == expect.encode(text)
        with pytest.raises(ValueError, match="want a list of texts, not one"): expect.encode_batch(kind(text))
    assert Tokenizer.train([text], 265, special_tokens=iter(["<|endoftext|>"])).hash == expect.hash
    assert expect.encode(text, iter(["<|endoftext|>"])) == expect.encode(text, "all") != expect.encode(text)
    with pytest.raises(ValueError, match="ids come last"): Tokenizer.train([text], 265, special_tokens={"<|x|>": 256})
    for rows in ({"text": "the cat"}, [{"text": "the cat"}]):
        with pytest.raises(ValueError, match=re.escape("not a dict: pass row['text']")): Tokenizer.train(rows, 300)


def test_bpe_surrogates_and_unknown_ids():
    tok = Tokenizer.train(["ab ab"], 260)
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb" and tok.decode(tok.encode("\ud83d\ude00")) == "😀"
    assert tok.encode("a\ud800b") == tok.to_tiktoken().encode_ordinary("a\ud800b")
    for bad in ([5000], [-1], np.array([70000])):
        with pytest.raises(ValueError, match="not in the vocabulary"): tok.decode(bad)
    for ids in (torch.tensor([97, 98]), list(torch.tensor([97, 98])), list(np.array([97, 98]))): assert tok.decode(ids) == "ab"
    with pytest.raises(TypeError, match="'list' object cannot be interpreted as an integer"): tok.decode([[97, 98]])


def test_bpe_stream_never_breaks_a_character():
    tok = Tokenizer.train(["x"], 256)
    text = "aé中😀z"
    parts = list(tok.decode_stream(iter(tok.encode(text))))
    assert parts == list(text)
    assert "".join(tok.decode_stream(b"a\xe4\xb8")) == "a\ufffd" and "".join(tok.decode_stream(b"\xffa\xe4b")) == "\ufffda\ufffdb"


def test_bpe_save_load_and_damage(tmp_path, monkeypatch):
    """Loading returns the tokenizer; any change to the file is an error that names the file; a full disk leaves the old file."""
    tok = Tokenizer.train(["the cat sat on the mat, the cat!"], 280, GPT4_SPLIT, ("<|a|>", "<|b|>"))
    path = str(tmp_path / "tok.json")
    tok.save(path)
    back = Tokenizer.load(path)
    assert (back.merges, back.pattern, back.special_tokens, back.hash, back.vocab_size) == \
        (tok.merges, tok.pattern, tok.special_tokens, tok.hash, tok.vocab_size)
    assert os.listdir(tmp_path) == ["tok.json"]
    assert Tokenizer.train(["the cat"], 260).hash != tok.hash
    assert Tokenizer([], normalizer="NFC").hash != Tokenizer([]).hash
    d = json.load(open(path))
    assert all(isinstance(p, list) and len(p) == 2 for p in d["merges"])
    for change in (lambda d: d.pop("merges"), lambda d: d["merges"].pop(), lambda d: d["merges"].reverse(),
                   lambda d: d["merges"].append([5, 999]), lambda d: d["merges"].append([5, -3]),
                   lambda d: d["merges"].append(d["merges"][0]), lambda d: d.update(merges=[["a", "b"]]),
                   lambda d: d.update(merges=[[1, 2, 3]]), lambda d: d.update(pattern="x"), lambda d: d.update(hash="0"),
                   lambda d: d["special_tokens"].update(z=5)):
        bad = json.loads(json.dumps(d))
        change(bad)
        with open(path, "w") as f: json.dump(bad, f)
        with pytest.raises(ValueError, match="tok.json"): Tokenizer.load(path)
    for content in (b"", b"{", b"[1]", b"3", b"\xff\xfe"):
        open(path, "wb").write(content)
        with pytest.raises(ValueError, match="tok.json"): Tokenizer.load(path)
    with pytest.raises(OSError): Tokenizer.load(str(tmp_path / "absent.json"))
    tok.save(path)
    before = open(path).read()
    monkeypatch.setattr(os, "replace", raising(OSError("disk")))
    with pytest.raises(OSError): Tokenizer.train(["zz zz"], 258).save(path)
    assert open(path).read() == before


@pytest.mark.parametrize("pattern", BPE_PATTERNS, ids=["gpt2", "gpt4", "cl100k"])
def test_bpe_hugging_face_peer(tmp_path, pattern):
    tokenizers = pytest.importorskip("tokenizers", reason="not installed: pip install tokenizers")
    rng = random.Random(6)
    text = open(random.__file__).read() + " ".join(str(rng.randrange(10 ** 9)) for _ in range(300))
    tok = Tokenizer.train([text], 700, pattern, ("<|endoftext|>", "<|x|>"))
    path = str(tmp_path / "tokenizer.json")
    tok.to_hf(path)
    theirs = tokenizers.Tokenizer.from_file(path)
    for t in [text] + [bpe_random_text(rng, 60) for _ in range(200)]:
        assert theirs.encode(t).ids == tok.encode(t) and theirs.decode(tok.encode(t)) == t
    assert theirs.encode("a<|x|>b").ids == tok.encode("a<|x|>b", "all")
    assert Tokenizer.from_hf(path).hash == tok.hash
    theirs.save(path)
    assert Tokenizer.from_hf(path).hash == tok.hash
    gaps = Tokenizer(tok.merges, pattern, {"<|x|>": 800, "<|y|>": 750})
    gaps.to_hf(path)
    assert tokenizers.Tokenizer.from_file(path).encode("a<|x|>b<|y|>").ids == gaps.encode("a<|x|>b<|y|>", "all")
    assert Tokenizer.from_hf(path).hash == gaps.hash


def test_bpe_hugging_face_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    tok = Tokenizer.train(["ab ab"], 258)
    tok.to_hf(path)
    good = json.load(open(path))
    with pytest.raises(ValueError, match="cannot hold the special token 'a'"): Tokenizer([], special_tokens=["a"]).to_hf(path)
    for change in (lambda d: d.pop("model"), lambda d: d["model"]["vocab"].pop("a"), lambda d: d["model"].update(merges=["a"])):
        bad = json.loads(json.dumps(good))
        change(bad)
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="tokenizer.json"): Tokenizer.from_hf(path)


@pytest.mark.parametrize("named, change", [
    ("WordPiece", lambda d: d["model"].update(type="WordPiece")), ("Unigram", lambda d: d["model"].update(type="Unigram")),
    ("byte_fallback", lambda d: (d["model"].update(byte_fallback=True), d.update(pre_tokenizer=None))),         # Llama 2
    ("Metaspace", lambda d: d.update(pre_tokenizer={"type": "Metaspace", "replacement": "_"})),
    ("NFKC", lambda d: d.update(normalizer={"type": "NFKC"})),
    ("pre-tokenizer is 'missing'", lambda d: d.update(pre_tokenizer=None)),
    ("prefix space", lambda d: d["pre_tokenizer"].update(add_prefix_space=True)),
    ("Digits", lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}, d["pre_tokenizer"]]})),
    ("invert.*True", lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": GPT2_SPLIT}, "behavior": "Isolated", "invert": True},
        d["pre_tokenizer"] | {"use_regex": False}]})),
    ("'ByteLevel, ByteLevel'", lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        d["pre_tokenizer"], d["pre_tokenizer"] | {"use_regex": False}]})),
    ("added white space is '  '", lambda d: d["added_tokens"].append({"content": "  ", "id": 258, "special": False})),
    ("added token '<.x.>' is 'lstrip'", lambda d: d["added_tokens"].append({"content": "<|x|>", "id": 258, "lstrip": True})),
    ("not those of its ids", lambda d: d["model"].update(merges=2 * d["model"]["merges"][:1])),
    ("not those of its ids", lambda d: d["model"].update(       # merging abc by these gives "ab" and "c", never "abc"
        merges=["a b", "b c", "a bc"], vocab=dict(list(d["model"]["vocab"].items())[:256]) | dict(ab=256, bc=257, abc=258))),
    ("not those of its ids", lambda d: d["model"].update(ignore_merges=True, merges=d["model"]["merges"][::-1]))])
def test_bpe_hugging_face_refused_by_name(tmp_path, named, change):
    Tokenizer.train(["ab ab"], 258, special_tokens=()).to_hf(tmp_path / "tokenizer.json")
    d = json.loads((tmp_path / "tokenizer.json").read_text())
    d["pre_tokenizer"] = d["pre_tokenizer"]["pretokenizers"][0]    # the form of GPT-2's own file
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    assert len(Tokenizer.from_hf(tmp_path / "tokenizer.json").merges) == 2
    change(d)
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    with pytest.raises(ValueError, match=f"tokenizer.json.*{named}"): Tokenizer.from_hf(tmp_path / "tokenizer.json")


def test_bpe_llama_and_qwen_files_peer(tmp_path):
    """Llama 3: every way to split a token is listed as a merge, whole words are looked up first, and some tokens are out of reach
    of merging. Qwen: NFC normalisation, and every digit is a word."""
    tokenizers = pytest.importorskip("tokenizers", reason="not installed: pip install tokenizers")
    rng, path = random.Random(9), tmp_path / "tokenizer.json"
    tok = Tokenizer.train([open(random.__file__).read() + "é中文 नमस्ते e\u0301 " * 20], 800, GPT4_SPLIT, ("<|bos|>", "<|eot|>"))
    tok.to_hf(path)
    d, letters = json.loads(path.read_text()), bpe.LETTERS
    split = d["pre_tokenizer"]["pretokenizers"][0]["pattern"]

    def same(texts):
        path.write_text(json.dumps(d))
        ours, theirs = Tokenizer.from_hf(path), tokenizers.Tokenizer.from_file(str(path))
        for text in texts:
            assert ours.encode(text) == theirs.encode(text).ids, text
            data = text.encode()
            assert list(ours.encode_iterable(data[i:i + 3] for i in range(0, len(data), 3))) == ours.encode(text)
        ours.save(tmp_path / "ours.json")
        ours.to_hf(path)
        assert Tokenizer.from_hf(path).hash == ours.hash == Tokenizer.load(tmp_path / "ours.json").hash != tok.hash
        theirs = tokenizers.Tokenizer.from_file(str(path))
        assert all(ours.encode(text) == theirs.encode(text).ids for text in texts)
        return ours
    split["Regex"], d["normalizer"] = bpe.QWEN_SPLIT, {"type": "NFC"}
    composed = ["e", "\u0301", "\u0323", " ", "中", "1", "23", "\u1100", "\u1161", "\u11a8", "\u0958", "\u212b", "a", "\n", "'S",
                "\u0344"]
    texts = ["".join(rng.choices(composed, k=rng.randint(1, 40))) for _ in range(300)]
    qwen = same(texts + [bpe_random_text(rng, 60) for _ in range(200)])
    assert qwen.normalizer == "NFC" and qwen.decode(qwen.encode("e\u0301")) == "é"
    with pytest.raises(ValueError, match="NFC"): qwen.to_tiktoken()
    extra = [b" integersX", "नमस्".encode(), b"zqzqz", b"zqzq", b"zqzqzk", b"def randrangex", b"aaaaa", b"aaa", b"aa", b"rnge",
             b"xrnge", b"nge"]
    rank = {tok.vocab[i]: i for i in range(tok.vocab_size - 2)}
    for token in extra: rank.setdefault(token, len(rank))
    name = {t: "".join(letters[b] for b in t) for t in rank}
    merges = [(t[:i], t[i:]) for t in rank for i in range(1, len(t)) if t[:i] in rank and t[i:] in rank]
    split["Regex"], d["normalizer"] = bpe.QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"), None
    d["model"] |= {"vocab": {name[t]: i for t, i in rank.items()}, "merges": [f"{name[a]} {name[b]}" for a, b in merges],
                   "ignore_merges": True}
    d["added_tokens"] = [t | {"id": len(rank) + i} for i, t in enumerate(d["added_tokens"])]
    pieces = [t.decode(errors="ignore") for t in extra] + ["zq", "qz", "a" * 13, "rnge ", "x", " "]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(500)]
    texts += [bpe_random_text(rng, 60) for _ in range(200)]
    llama = same(texts + ["x".join(texts[:100]).replace(" ", "")])
    assert llama.pattern == GPT4_SPLIT and not {*extra} <= {llama.vocab[a] + llama.vocab[b] for a, b in llama.merges}
    engine = llama.to_tiktoken()
    assert all(llama.encode(text) == engine.encode_ordinary(text) for text in texts)
    assert Tokenizer.from_tiktoken(engine).merges == llama.merges


def test_bpe_merges_of_a_vocabulary_made_elsewhere(tmp_path):
    """They are those that were learned, found from the tokens alone; a token that merging does not reach has none."""
    tok = Tokenizer.train([bpe_stdlib_text("argparse.py")], 900)
    foreign = Tokenizer.from_tiktoken(tok.to_tiktoken())
    tok.to_hf(tmp_path / "hf.json")
    foreign.save(tmp_path / "ours.json")
    for same in (foreign, Tokenizer.load(tmp_path / "hf.json"), Tokenizer.load(tmp_path / "ours.json")):
        assert same.merges == tok.merges and same.hash == tok.hash
    assert json.loads((tmp_path / "ours.json").read_text())["merges"] == [list(pair) for pair in tok.merges]
    foreign.to_hf(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "hf.json").read_bytes()
    more = Tokenizer([], tokens={token: i for token, i in foreign._tokens.items()} | {b"zqzqz": 899, b"zq": 900})
    assert more.merges == [*tok.merges, (ord("z"), ord("q"))]               # zq comes too late for zqzqz
    text = "zqzqz zq zqzq"
    assert more.encode(text) == more.to_tiktoken().encode_ordinary(text)


def test_bpe_auto_tokenizer_peer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    tok = Tokenizer.train(["the cat sat on the mat, the cat sat"], 275, GPT4_SPLIT)
    tok.to_hf(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat, 1234 é\n <|endoftext|>sat"
    assert theirs.encode(text) == tok.encode(text, "all") and theirs.decode(tok.encode(text)) == text


def test_bpe_gpt2_files(tmp_path):
    if not os.path.isdir(BPE_GPT2):
        pytest.skip("GPT-2's published files are not there: put merges.txt and vocab.json in ../shared/data/gpt2")
    merges, vocab = (os.path.join(BPE_GPT2, f) for f in ("merges.txt", "vocab.json"))
    tok = Tokenizer.from_gpt2(merges, vocab)
    published = [line.split() for line in open(merges, encoding="utf-8").read().split("\n") if line and line[:8] != "#version"]
    assert [[bpe.letters(tok.vocab[i]) for i in pair] for pair in tok.merges] == published
    assert tok.vocab_size == 50257 and tok.encode("hello world<|endoftext|>", "all") == [31373, 995, 50256]
    assert Tokenizer.from_gpt2(merges).hash == tok.hash
    engine = tok.to_tiktoken()
    assert Tokenizer.from_tiktoken(engine).hash == tok.hash
    path = str(tmp_path / "gpt2.json")
    tok.save(path)
    assert Tokenizer.load(path).hash == tok.hash
    rng = random.Random(7)
    texts = [bpe_random_text(rng, 100) for _ in range(300)] + [open(os.__file__).read()]
    for t, ids in zip(texts, tok.encode_batch(texts)):
        assert ids.tolist() == engine.encode_ordinary(t) and tok.decode(ids) == t
    assert tok.decode_bytes(tok.encode(bytes(range(256)))) == bytes(range(256))


def test_bpe_gpt2_files_made_here(tmp_path):
    """Files made here in GPT-2's format, for want of the published ones: bytes in GPT-2's order, merges in its letters."""
    tok = Tokenizer.train(["the cat sat on the mat ééé 中文"], 280, special_tokens=())
    letters = bpe.LETTERS
    name = lambda i: "".join(letters[b] for b in tok.vocab[i])
    path = tmp_path / "merges.txt"
    path.write_text("#version: 0.2\n" + "".join(f"{name(a)} {name(b)}\n" for a, b in tok.merges), encoding="utf-8")
    gpt2 = Tokenizer.from_gpt2(str(path))
    (tmp_path / "names.json").write_text('{"model": 1, "hash": 2, "merges": 3}')    # a vocab.json: these are tokens of GPT-2
    for wrong in (path, tmp_path / "names.json"):
        with pytest.raises(ValueError, match=re.escape(wrong.name) + ": want a file of Tokenizer.save .*from_gpt2.*save"):
            Tokenizer.load(wrong)
    assert gpt2.encode("!") == [0] and gpt2.special_tokens == {"<|endoftext|>": tok.vocab_size} and gpt2.hash != tok.hash
    for t in ("the cat", "中é\n", "<|endoftext|>"):
        assert [gpt2.vocab[i] for i in gpt2.encode(t)] == [tok.vocab[i] for i in tok.encode(t)]
        assert gpt2.encode(t) == gpt2.to_tiktoken().encode_ordinary(t)
    assert Tokenizer.from_dict(gpt2.to_dict()).encode("the cat") == gpt2.encode("the cat")
    path.write_text("a b c\n")
    with pytest.raises(ValueError, match="merges.txt"): Tokenizer.from_gpt2(str(path))
    path.write_text("a b\n")
    vocab = tmp_path / "vocab.json"
    vocab.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="missing"): Tokenizer.from_gpt2(str(path), str(vocab))


def test_bpe_tiktoken_files(tmp_path, monkeypatch):
    """tiktoken's rank files and encodings: good ones load, bad ones are refused; without a network, gpt2() says what to do."""
    tok = Tokenizer.train([open(random.__file__).read()], 600, GPT4_SPLIT, ("<|endoftext|>",))
    assert Tokenizer.from_tiktoken(tok.to_tiktoken()).hash == tok.hash
    path = tmp_path / "x.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in sorted(tok.vocab.items()) if i < 599))
    assert Tokenizer.from_tiktoken(str(path), GPT4_SPLIT, ("<|endoftext|>",)).hash == tok.hash
    for content in ("YQ==", "YQ== 1\n", "?? 1\n", "YQ== x\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match="cannot read .*x.tiktoken: "): Tokenizer.from_tiktoken(str(path))
    monkeypatch.setattr(tiktoken, "get_encoding", raising(ConnectionError("no network")))
    with pytest.raises(ValueError, match="--tokenizer: Tokenizer.from_gpt2.*save"): Tokenizer.gpt2()


def test_bpe_equals_rustbpe_peer():
    rustbpe = pytest.importorskip("rustbpe", reason="not installed: pip install rustbpe")
    text = bpe_stdlib_text("turtle.py", "pydoc.py")
    for pattern in (GPT2_SPLIT, GPT4_SPLIT):
        theirs = rustbpe.Tokenizer()
        theirs.train_from_iterator([text], 5000, pattern=pattern)
        tok = Tokenizer.train([text], 5000, pattern, special_tokens=())
        assert {bytes(t): i for t, i in theirs.get_mergeable_ranks()} == {t: i for i, t in tok.vocab.items()}


def test_bpe_equals_hugging_face_trainer_peer():
    """Hugging Face numbers the 256 bytes by the letters that stand for them and breaks ties by those numbers: so do we here."""
    tokenizers = pytest.importorskip("tokenizers", reason="not installed: pip install tokenizers")
    text = bpe_stdlib_text("turtle.py", "pydoc.py")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=5000, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(theirs.to_str())["model"]
    order = sorted(range(256), key=lambda b: bpe.LETTERS[b])
    number = bytes(np.argsort(order).tolist())
    words = {word.translate(number): count for word, count in bpe.count_words([text.encode()], GPT2_SPLIT).items()}
    merges = bpe.learn_merges(words, 5000 - 256)
    assert merges == [(model["vocab"][a], model["vocab"][b]) for a, b in model["merges"]]


def bpe_script(folder, code, **kw):
    """Start the code as a script: worker processes need a file they can import."""
    (folder / "script.py").write_text(code)
    return subprocess.Popen([sys.executable, "script.py"], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kw)


def test_bpe_workers_that_are_spawned(tmp_path):
    """As on macOS and Windows, where workers start afresh and import the main module again."""
    out, err = bpe_script(tmp_path, """
import sys, bpe
if __name__ == '__main__':
    sys.platform, bpe.BATCH = 'elsewhere', 1000
    docs = [f'the cat {i} sat é' for i in range(300)]
    print(bpe.Tokenizer.train(docs, 300, workers=2).hash == bpe.Tokenizer.train(docs, 300, workers=1).hash)
""").communicate(timeout=100)
    assert out == "True\n" and "Traceback" not in err, err


@pytest.mark.parametrize("function, times", [("operator.neg", 1), ("job", 3)])
def test_bpe_spawned_workers_import_the_script_only_if_they_need_it(tmp_path, function, times):
    """For train.py, that would be all of torch."""
    out, err = bpe_script(tmp_path, f"""
import operator, os, sys, bpe
with open("imports", "a") as f: f.write("x")
def job(i): return -i
if __name__ == '__main__':
    sys.platform = 'elsewhere'
    print(list(bpe.in_order({function}, range(5), 2)), sys.modules['__main__'].job is job, os.path.getsize("imports"))
""").communicate(timeout=100)
    assert out == f"[0, -1, -2, -3, -4] True {times}\n", (out, err)


@needs_fork
@pytest.mark.parametrize("fork", [1, 2])
def test_bpe_ctrl_c_in_the_middle_of_a_fork_waits(tmp_path, fork):
    out, err = bpe_script(tmp_path, f"""
import os, signal, time, bpe
import torch                                                    # has threads, which a signal may choose
parent, forks = os.getpid(), []
def fork():
    forks.append(1)
    if len(forks) == {fork}:
        os.kill(parent, signal.SIGINT)
        time.sleep(0.02)
os.register_at_fork(before=fork)
signal.signal(signal.SIGINT, signal.default_int_handler)
try: print(list(bpe.in_order(abs, range(20), 2)))
except KeyboardInterrupt: print("interrupted")
""").communicate(timeout=100)
    assert (out, err) == ("interrupted\n", ""), err


def test_bpe_interrupt_and_dead_worker_leave_no_processes(monkeypatch):
    monkeypatch.setattr(bpe, "BATCH", 1000)

    def docs():
        for i in range(300): yield f"the cat {i} sat on the mat " * 5
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): Tokenizer.train(docs(), 300, workers=2)
    import multiprocessing
    assert not multiprocessing.active_children()

    def deadly():
        for i in range(3000):
            yield f"the cat {i} sat on the mat " * 5
            if i == 300: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(OSError, match="worker process died"): Tokenizer.train(deadly(), 300, workers=2)
    assert not multiprocessing.active_children()


def test_bpe_worker_that_dies_while_it_writes_a_result(tmp_path):
    """After half a result, the parent must not wait for the rest forever."""
    out, err = bpe_script(tmp_path, """
import os, threading, time, bpe
def job(i):
    if i == 1: threading.Timer(0.3, os._exit, [1]).start()
    return bytes(10 ** 6)                                       # more than a pipe holds
if __name__ == '__main__':
    try: print([time.sleep(1) or len(result) for result in bpe.in_order(job, range(8), 2)])
    except OSError as e: print(e)
""").communicate(timeout=60)
    assert out.startswith("a worker process died") and "--workers=1" in out, err


@needs_fork
def test_bpe_interrupted_training_ends_at_once(tmp_path):
    """Ctrl-C, which the terminal sends to the workers too: none of them finishes its job first."""
    with bpe_script(tmp_path, """
import signal, time, bpe
signal.signal(signal.SIGINT, signal.default_int_handler)        # what runs in the background ignores it
bpe.BATCH = 1000
def slow(pieces, pattern):
    time.sleep(30)
bpe.count_words = slow
def docs():
    for i in range(10 ** 9):
        yield f'the cat {i} sat on the mat ' * 5
        if i == 20: print(i, flush=True)
bpe.Tokenizer.train(docs(), 300, workers=2)
""", start_new_session=True) as parent:
        parent.stdout.readline()
        time.sleep(0.5)
        began = time.time()
        os.killpg(parent.pid, signal.SIGINT)
        err = parent.communicate()[1]
    assert time.time() - began < 10 and err.rstrip().endswith("KeyboardInterrupt"), err


def test_bpe_killed_training_leaves_no_processes(tmp_path):
    """When the parent is killed and cannot stop its workers, they end by themselves."""
    with bpe_script(tmp_path, """
import multiprocessing, bpe
bpe.BATCH = 1000
def docs():
    for i in range(10 ** 9):
        yield f'the cat {i} sat on the mat ' * 5
        if i == 300: print(*(p.pid for p in multiprocessing.active_children()), flush=True)
bpe.Tokenizer.train(docs(), 300, workers=2)
""") as parent:
        workers = list(map(int, parent.stdout.readline().split()))
        parent.kill()
    assert len(workers) == 2
    deadline = time.time() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and sys.platform == "linux":
        assert time.time() < deadline, "the workers live on"
        time.sleep(0.1)


def test_bpe_memory_of_a_stream_is_bounded(monkeypatch):
    """Training reads the iterator no further ahead than the batches in flight."""
    monkeypatch.setattr(bpe, "BATCH", 1000)
    taken, counted = 0, []

    def docs():
        nonlocal taken
        for i in range(200):
            taken += 1
            yield "a b c d " * 125
    in_order = bpe.in_order
    monkeypatch.setattr(bpe, "in_order", lambda *a: (counted.append(taken) or x for x in in_order(*a)))
    Tokenizer.train(docs(), 258, workers=2)
    assert counted[0] <= 6 and max(b - a for a, b in zip(counted, counted[1:])) <= 6 and len(counted) >= 195


def test_bpe_trains_inside_a_worker_process_and_in_threads(monkeypatch):
    monkeypatch.setattr(bpe, "BATCH", 1000)
    docs, script = ["a b c d " * 125] * 20, sys.modules["__main__"]
    with multiprocessing.get_context("fork").Pool(1) as pool:           # its workers may not start any
        assert pool.apply(Tokenizer.train, (docs, 260)).hash == Tokenizer.train(docs, 260, workers=2).hash
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert len({tok.hash for tok in threads.map(lambda n: Tokenizer.train(docs, 260, workers=2), range(8))}) == 1
    assert sys.modules["__main__"] is script


def test_bpe_command_line(tmp_path):
    def run(*args):
        words = [sys.executable, os.path.join(HERE, "bpe.py"), *args]
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    (tmp_path / "a.txt").write_bytes(b"the cat sat\r\n on the mat \xff\xfe" * 50)
    (tmp_path / "empty.txt").write_bytes(b"")
    r = run("empty.txt", "a.txt", "--vocab_size=280", "--out=tok.json")
    assert r.returncode == 0 and "merges" in r.stdout and "bytes per token" in r.stdout, r.stderr
    expect = Tokenizer.train([(tmp_path / "a.txt").read_bytes()], 280)
    assert Tokenizer.load(tmp_path / "tok.json").hash == expect.hash
    r = run("a.txt", "--vocab_size=270", "--pattern=gpt4", "--special=<|a|>,<|b|>,", "--out=tok4.json")
    tok = Tokenizer.load(tmp_path / "tok4.json")
    assert tok.pattern == GPT4_SPLIT and list(tok.special_tokens) == ["<|a|>", "<|b|>"] and tok.vocab_size == 270
    os.mkdir(tmp_path / "folder")
    for name in ("utf16.txt", "A.JSONL", "a.txt.gz"): (tmp_path / name).write_text("the cat" * 9, "utf-16" if "16" in name else None)
    for message, *args in (("absent.txt", "absent.txt"), ("no text", "empty.txt"), ("256", "a.txt", "--vocab_size=100"),
                           ("a folder that exists", "a.txt", "--out=no/such/folder.json"), ("a file of its own", "a.txt", "--out=a.txt"),
                           ("a file of its own", "a.txt", "--out=folder"),
                           ("name files", "a.txt", "folder"),
                           *[("is not UTF-8 text", "a.txt", name) for name in ("utf16.txt", "A.JSONL", "a.txt.gz")]):
        r = run(*args)
        assert r.returncode and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1 and message in r.stderr, r.stderr
    assert sorted(os.listdir(tmp_path)) == sorted("a.txt empty.txt folder utf16.txt A.JSONL a.txt.gz tok.json tok4.json".split())
    words = [sys.executable, os.path.join(HERE, "bpe.py"), "a.txt", "--vocab_size=280", "--out=closed.json"]
    assert subprocess.run(["sh", "-c", 'exec "$0" "$@" 2>&-', *words], cwd=tmp_path, stdout=subprocess.PIPE).returncode == 0
    assert Tokenizer.load(tmp_path / "closed.json").hash == expect.hash


def test_bpe_takes_the_cores_that_it_may_use(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5, 7}, raising=False)
    monkeypatch.setattr(bpe, "in_order", lambda function, jobs, workers: asked.append(workers) or map(function, jobs))
    for workers in (None, 2): bpe.Tokenizer.train("some text", 260, workers=workers)
    assert asked == [3, 2]


def test_bpe_pickles():
    """Small and the same whether it was used or not."""
    import pickle
    for tok in Tokenizer.train(["the cat sat on the mat"], 262), Tokenizer([], tokens=BPE_BYTES | {b"at": 300}, normalizer="NFC"):
        before = pickle.dumps(tok)
        for back in (pickle.loads(before), copy.copy(tok), copy.deepcopy(tok)):
            assert back.to_dict() == tok.to_dict() and back.encode("the mat") == tok.encode("the mat")
        for back in (pickle.loads(pickle.dumps(tok)), copy.deepcopy(tok)): assert back.to_dict() == tok.to_dict()
        assert len(before) < 10_000 and pickle.dumps(tok) == before


# ======================================================== prepare.py: the bins hold every document once, whatever happens

PREPARE_WORDS = "the of a model token Byte learns runs über naïve 東京 don't 42 <|endoftext|> \t x=1; {} \r\n".split(" ")


def prepare_text(seed, n):
    r = random.Random(seed)
    return " ".join(r.choice(PREPARE_WORDS) for _ in range(n)) + f" {seed}\n"


def prepare_files(folder, files):
    """{"a/b.txt": bytes or str} -> the files, under folder."""
    for name, text in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f: f.write(text if isinstance(text, bytes) else text.encode())


def prepare_cfg(**kw):
    return config.Config(**{"dataset": "mine", "input": "in", "vocab_size": 300, "workers": 1, **kw})


def prepare_run(**kw):
    cfg = prepare_cfg(**kw)
    prepare.main(cfg)
    return prepare_verify(cfg)


def prepare_verify(cfg):
    """prepare.verify, which compares sizes, and the sha256 of every bin as well. -> meta"""
    meta = prepare.verify(cfg)
    for name, digest in meta["sha256"].items(): assert prepare.sha256(f"data/{meta['dataset']}/{name}") == digest
    return meta


def prepare_documents(meta, split):
    """The documents of a bin as bytes, split at end-of-text, and the tokenizer."""
    folder = f"data/{meta['dataset']}"
    tok = bpe.Tokenizer.load(f"{folder}/tokenizer.json")
    ids = np.fromfile(f"{folder}/{split}.bin", np.uint16)
    assert ids[-1] == meta["eot"] == tok.special_tokens["<|endoftext|>"]
    return [tok.decode_bytes(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == meta["eot"]) + 1)[:-1]], tok


def prepare_hashes(folder):
    return {name: prepare.sha256(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}


def test_prepare_end_to_end(here, capsys):
    """Every kind of file, duplicates, empty texts, odd bytes: each document is in one bin, once and whole; meta.json is right."""
    files = {f"in/{i:02d}{ending}": prepare_text(i, 50 + i) for i, ending in enumerate([".txt", ".md", ".py"] * 12)}
    files |= {"in/sub/bad.txt": b"caf\xc3\xa9 \xff\xfe\x80 broken \xe6\x9d", "in/sub/crlf.txt": "one\r\ntwo\r\n\r\nthree",
              "in/z.txt": "text with <|endoftext|> in it, twice: <|endoftext|>", "in/empty.txt": "",
              "in/copy.md": files["in/00.txt"]}
    lines = [prepare_text(100 + i, 20) for i in range(30)]
    lines += ["", prepare_text(100, 20), "lone \ud83d half", "in a string: <|endoftext|>"]
    jsonl = "\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(lines)).encode()
    files["in/docs.jsonl"] = jsonl + b'\n\n{"text": "raw \xff byte"}'
    files |= {"in/picture.png": "not text", "in/.hidden.txt": "not read", "in/.hidden/secret.txt": "not read",
              "in/__pycache__/x.py": "not read"}
    prepare_files(".", files)
    assert prepare.walk("in", skip=("sub",)) == [path for path in prepare.walk("in") if "sub" not in path]
    meta = prepare_run()
    assert "dropped 2 duplicate and 2 empty" in capsys.readouterr().out
    train, tok = prepare_documents(meta, "train")
    val, _ = prepare_documents(meta, "val")
    texts = [t for name, t in files.items() if re.search(r"^in/(sub/)?\w+\.(txt|md|py)$", name) and t]
    want = [t if isinstance(t, bytes) else t.encode() for t in texts]
    want += [t.encode("utf-8", "surrogatepass") for t in lines if t] + [b"raw \xff byte"]
    assert sorted(train + val) == sorted(set(want))
    assert (meta["duplicates"], meta["empty"]) == (2, 2)
    for split, docs in (("train", train), ("val", val)):
        assert meta["documents"][split] == len(docs) > 0 and meta["bytes"][split] == sum(map(len, docs))
        flat = [i for doc in docs for i in (*tok.encode(doc), meta["eot"])]
        assert flat == np.fromfile(f"data/mine/{split}.bin", np.uint16).tolist() and meta["tokens"][split] == len(flat)
    again = bpe.Tokenizer.train(train, 300)         # learned from the training split only
    assert tok.merges == again.merges and meta["tokenizer_hash"] == tok.hash and meta["vocab_size"] == 300
    assert sorted(os.listdir("data/mine")) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    assert json.load(open("data/mine/meta.json"))["knobs"]["vocab_size"] == 300
    os.utime("in/00.txt", (2e9, 2e9))               # newer, but the same
    assert prepare.outdated(prepare_cfg())
    prepare.main(prepare_cfg())
    assert "prepared already" in capsys.readouterr().out and not prepare.outdated(prepare_cfg())


def test_prepare_single_text_splits_at_last_tenth(here, monkeypatch):
    """The first nine tenths of the bytes are for training, and the cut is never inside a character."""
    monkeypatch.setattr(prepare, "UNIT", 1000)      # so that there are many units
    monkeypatch.setattr(bpe, "CHUNK", 500)
    for pad in (b"", b"!" * 10):                    # for one of the two, nine tenths end inside a character
        text = pad + prepare_text(1, 4000).encode() + b"\xc3\xa9" * 3000 + b"end"
        prepare_files(".", {"a.txt": text})
        meta = prepare_run(input="a.txt", vocab_size=400)
        middle = int(len(text) * 0.9)
        middle += text[middle] & 0xC0 == 0x80
        tok = bpe.Tokenizer.load("data/mine/tokenizer.json")
        for split, part in (("train", text[:middle]), ("val", text[middle:])):
            ids = np.fromfile(f"data/mine/{split}.bin", np.uint16)
            assert ids.tolist() == tok.encode(part)     # as encoded whole; a single text gets no end-of-text
            assert meta["bytes"][split] == len(part) and meta["documents"][split] == 1
    assert prepare_run(input="a.txt", vocab_size=256)["vocab_size"] == 256
    assert np.fromfile("data/mine/train.bin", np.uint16).astype(np.uint8).tobytes() == text[:middle]


def test_prepare_long_documents_in_pieces(here, monkeypatch):
    """Documents longer than a unit of work are compared for duplicates and encoded as if they were read whole."""
    r = random.Random(0)
    docs = [prepare_text(i, r.randrange(1, 900)).encode() for i in range(20)]
    first, a, b = (b"".join(b"%029d\n" % (n * 100 + i) for i in range(rows)) for n, rows in enumerate((11, 10, 10)))
    docs += [first + a + b + b"end" * 99, first + b + a + b"end" * 99]      # in units of 300: same pieces, other order
    docs += [b"\xe6\x9d\xb1\xe4\xba\xac" * 400, b"a" * 3000, b"\xff" * 2500, b" \r\n" * 900, ("word\u3000" * 300).encode()]
    prepare_files("in", {f"{i:02d}.txt": doc for i, doc in enumerate(docs)} | {"99.txt": docs[0], "98.txt": docs[3]})
    for unit in (300, 1 << 20):                 # bytes: many units per document; all in one unit
        monkeypatch.setattr(prepare, "UNIT", unit)
        monkeypatch.setattr(bpe, "CHUNK", 1 + unit // 3)
        for pattern in ("gpt2", "gpt4"):
            meta = prepare_run(split_pattern=pattern, dataset=f"d{unit}{pattern}")
            found = [prepare_documents(meta, split) for split in ("train", "val")]
            assert sorted(found[0][0] + found[1][0]) == sorted(docs) and meta["duplicates"] == 2
            for split, (part, tok) in zip(("train", "val"), found):
                flat = [i for doc in part for i in (*tok.encode(doc), meta["eot"])]
                assert flat == np.fromfile(f"data/{meta['dataset']}/{split}.bin", np.uint16).tolist()


def test_prepare_output_does_not_depend_on_workers_or_order(here, monkeypatch):
    monkeypatch.setattr(prepare, "UNIT", 2000)
    prepare_files("in", {f"{i:03d}.txt": prepare_text(i, 100) for i in range(150)})
    hashes, walk = [], os.walk
    for workers, step in ((1, 1), (2, -1), (0, 1)):         # -1: the folder lists its files in the opposite order
        monkeypatch.setattr(os, "walk", lambda *args, **kw: ((a, b, names[::step]) for a, b, names in walk(*args, **kw)))
        prepare_run(workers=workers)
        hashes.append(prepare_hashes("data/mine"))
        for name in os.listdir("data/mine"): os.remove(f"data/mine/{name}")
    assert hashes[0] == hashes[1] == hashes[2] and set(hashes[0]) == {"meta.json", "tokenizer.json", "train.bin", "val.bin"}


def test_prepare_split_stays_when_data_is_added(here, capsys):
    prepare_files("in", {f"{i:03d}.txt": prepare_text(i, 10) for i in range(100)})
    old = prepare_documents(prepare_run(), "val")[0]
    prepare_files("in", {f"0{i:03d}.md": prepare_text(1000 + i, 10) for i in range(100)})
    meta = prepare_run()
    assert "text has changed" in capsys.readouterr().out
    new = prepare_documents(meta, "val")[0]
    assert set(old) < set(new) and 3 <= len(old) <= 20
    assert not set(old) & set(prepare_documents(meta, "train")[0])
    more = prepare_documents(prepare_run(val_fraction=0.5), "val")[0]
    assert set(new) < set(more) and 70 < len(more) < 130


def test_prepare_few_documents_fill_both_splits(here, monkeypatch):
    monkeypatch.setattr(prepare, "UNIT", 300)       # so some documents span several
    monkeypatch.setattr(bpe, "CHUNK", 100)
    for seed in range(6):
        prepare_files(f"in{seed}", {f"{i}.txt": prepare_text(10 * seed + i, 20 + 200 * i) for i in range(2)})
        for val_fraction in (0.1, 0.99):
            meta = prepare_run(input=f"in{seed}", dataset=f"d{seed}", val_fraction=val_fraction)
            assert meta["documents"] == {"train": 1, "val": 1}
            assert (meta["bytes"]["train"] > meta["bytes"]["val"]) or val_fraction > 0.5        # not trained on the small one


PREPARE_COMMAND = [sys.executable, "-c", """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)        # what runs in the background ignores it
import config, prepare
prepare.UNIT, prepare.SAVE = 3000, 0
encode = prepare.encode_unit
def slow(*job):
    import time; time.sleep(0.004)
    return encode(*job)
prepare.encode_unit = slow
config.run(prepare.main)
""", "--dataset=mine", "--input=in", "--vocab_size=400", "--workers=2"]


def prepare_kill_and_restart(kills, seed, sig=9):
    """Start prepare.py and kill it at a random moment, `kills` times; then let it finish. -> how many runs were killed midway."""
    r, cut = random.Random(seed), 0
    for n in range(kills):
        p = subprocess.Popen(PREPARE_COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        if sig == signal.SIGINT or n % 2: p.stdout.readline()    # Ctrl-C during imports is up to Python
        time.sleep(r.uniform(0, 0.3 if sig == signal.SIGINT else 0.8))
        if p.poll() is None:
            cut += 1
            p.send_signal(sig) if sig == signal.SIGKILL else os.killpg(p.pid, sig)
        err = p.communicate(timeout=20)[1]
        if os.path.exists("data/mine/meta.json"): assert p.returncode in (0, 130, -sig), err     # Python drops handlers at exit
        else: assert p.returncode == (130 if sig == signal.SIGINT else -sig), err
        assert "Traceback" not in err, err
        if not os.path.exists("data/mine/meta.json"): assert not os.path.exists("data/mine/train.bin")
    done = subprocess.run(PREPARE_COMMAND, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cut


def test_prepare_killed_at_any_moment_restarts_to_the_same_bytes(here):
    prepare_files("in", {f"{i:03d}.txt": prepare_text(i, 200) for i in range(300)})
    hashes = []
    for sig in (signal.SIGKILL, signal.SIGINT):
        assert prepare_kill_and_restart(3, seed=1, sig=sig)
        hashes.append(killed := prepare_hashes("data/mine"))
        for name in killed: os.remove(f"data/mine/{name}")
    prepare_kill_and_restart(0, seed=0)
    assert hashes == [prepare_hashes("data/mine")] * 2 and set(killed) == {"meta.json", "tokenizer.json", "train.bin", "val.bin"}


def test_prepare_restart_skips_finished_units(here, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "UNIT", 2000)
    monkeypatch.setattr(prepare, "SAVE", 0)
    prepare_files("in", {f"{i:03d}.txt": prepare_text(i, 100) for i in range(50)})
    encode, seen = prepare.encode_unit, []

    def encode_unit(*job):
        if len(seen) == 5: raise KeyboardInterrupt
        seen.append(job)
        return encode(*job)
    monkeypatch.setattr(prepare, "encode_unit", encode_unit)
    with pytest.raises(KeyboardInterrupt): prepare_run()
    assert not prepare.prepared(prepare_cfg())
    monkeypatch.setattr(prepare, "encode_unit", encode)
    monkeypatch.setattr(bpe.Tokenizer, "train", None)       # must not be trained again
    monkeypatch.setattr(prepare.bpe.Tokenizer, "encode_batch",
                        lambda self, texts, batch=bpe.Tokenizer.encode_batch: seen.append("again") or batch(self, texts))
    prepare_run()
    out = capsys.readouterr().out
    units = int(re.search(r"going on: 5 of (\d+) units", out)[1])
    assert seen.count("again") == units - 5


def test_prepare_restart_with_the_same_texts_in_other_units(here, monkeypatch, capsys):
    """Units are cut by the bytes of the files: without a field the same documents are in other units, and all begins anew."""
    monkeypatch.setattr(prepare, "UNIT", 2000)
    monkeypatch.setattr(prepare, "SAVE", 0)
    texts = [prepare_text(i, 20) for i in range(200)]
    def write(**more): prepare_files("in", {"a.jsonl": "".join(json.dumps({"text": t} | more) + "\n" for t in texts)})
    write()
    prepare_run()
    hashes = prepare_hashes("data/mine")
    shutil.rmtree("data/mine")
    write(url="x" * 100)
    encode, seen = prepare.encode_unit, []
    monkeypatch.setattr(prepare, "encode_unit", lambda *job: seen.append(1) or (encode(*job) if len(seen) < 6 else 1 / 0))
    with pytest.raises(ZeroDivisionError): prepare_run()
    monkeypatch.setattr(prepare, "encode_unit", encode)
    write()
    prepare_run()
    assert prepare_hashes("data/mine") == hashes and "going on" not in capsys.readouterr().out


@pytest.mark.parametrize("kw, files, message", [
    (dict(input="nowhere"), {}, "no file or folder 'nowhere'"),
    (dict(input="in/a.txt,gone.txt"), {"a.txt": "x"}, "no file or folder 'gone.txt'"),
    (dict(input="in/*.txt"), {"a.txt": "x"}, "no file or folder 'in/*.txt' (no patterns: name the folder)"),
    (dict(), {"a.bin": "x"}, "nothing to read in 'in'"),
    (dict(input="in/a.bin"), {"a.bin": "x"}, "nothing to read in 'in/a.bin', only .txt .md .py .jsonl: write it as .jsonl"),
    (dict(), {"a.txt": "x", "b.txt": "no UTF-8".encode("utf-16-le")}, None),                # nothing marks it
    (dict(), {"a.txt": "x", "b.txt": b"\xff\xfe no UTF-16 either"}, None),
    (dict(), {"a.txt": "one text " * 99, "b.md": "", "c.jsonl": ""}, None),               # the last tenth is for validation
    (dict(), {"a.txt": "x", "b.txt": "no UTF-8".encode("utf-16")}, "in/b.txt is UTF-16: convert it to UTF-8"),
    (dict(), {"b.jsonl": b"\xfe\xff" + '{"text": "x"}'.encode("utf-16-be")}, "in/b.jsonl is UTF-16: convert it to UTF-8"),
    (dict(), {"a.txt": ""}, "nothing to read: in has nothing but empty documents"),
    (dict(), {"a.txt": "", "b.md": ""}, "nothing to read"),
    (dict(input=""), {}, "say what to read"), (dict(input=" , "), {}, "say what to read"),
    (dict(dataset="stdlib"), {"a.txt": "x"}, "NAME of its own, such as --dataset=in"),
    (dict(dataset="stdlib_x"), {"a.txt": "x"}, "NAME of its own"),
    (dict(dataset="../up"), {"a.txt": "x"}, "not a plain name"),
    (dict(vocab_size=255), {"a.txt": "x"}, "between 256"),
    (dict(vocab_size=65537), {"a.txt": "x"}, "65536"),
    (dict(vocab_size=256), {"a.txt": "x", "b.txt": "y"}, "vocab_size to 257"),
    (dict(tokenizer="gone.json"), {"a.txt": "x"}, "neither bpe nor gpt2 nor a file"),
    (dict(tokenizer="in/a.txt"), {"a.txt": "x"}, "in/a.txt"),
    (dict(), {"a.txt": "same", "b.txt": "same"}, "does not make two splits"),
    (dict(input="in/a.txt"), {"a.txt": "x"}, "does not make two splits"),
    (dict(), {"a.txt": "x", "b.jsonl": '{"text": "fine"}\n\n{"text": 3}\n'}, "in/b.jsonl, line 3: not a JSON object"),
    (dict(), {"b.jsonl": '{"text": "fine"}\n{"text": "cut'}, "in/b.jsonl, line 2: not a JSON object"),
    (dict(), {"b.jsonl": '{"body": "fine"}'}, "in/b.jsonl, line 1"),
    (dict(), {"b.jsonl": "[1]"}, "in/b.jsonl, line 1"),
    (dict(), {"b.jsonl": '{"text": "fine"}\n' + "[" * 100_000}, "in/b.jsonl, line 2"),
    (dict(input="in/b.jsonl"), {"b.jsonl": " \n\n\t\n"}, "nothing but empty documents"),
    (dict(input="in/a.txt", val_fraction=0.99), {"a.txt": "x" * 10}, "long enough for val_fraction=0.99"),
    (dict(dataset="fineweb", input=""), {}, "needs --tokenizer=gpt2"),
    (dict(input="in", dataset="other", val_fraction=0.5), {"a.txt": "x" * 10, "b.txt": "y"}, None),
    (dict(input="in/a.txt,in/a.txt"), {"a.txt": "named twice " * 99}, None),
])
def test_prepare_refuses_in_one_line_or_takes_what_only_looks_bad(here, kw, files, message):
    prepare_files("in", files)
    if message is None:
        prepare_run(**kw)
        return
    with pytest.raises(ValueError, match=re.escape(message)) as e: prepare_run(**kw)
    assert "\n" not in str(e.value) and not prepare.prepared(prepare_cfg()) and not os.path.exists("data/mine/train.bin")


def test_prepare_bad_line_in_a_later_unit_has_its_number(here, monkeypatch):
    monkeypatch.setattr(prepare, "UNIT", 500)
    lines = [json.dumps({"text": prepare_text(i, 20)}) for i in range(100)]
    prepare_files("in", {"x.jsonl": "\n".join(lines)})
    meta = prepare_run(workers=2)
    assert sum(meta["documents"].values()) == 100 and len([*prepare.cut(*prepare.sources(prepare_cfg()))]) > 20
    lines[76] = "{}"
    prepare_files("in", {"x.jsonl": "\n".join(lines)})
    for workers in (1, 2):
        with pytest.raises(ValueError, match="x.jsonl, line 77: not"): prepare_run(workers=workers)


def says(role, text): return {"role": role, "content": text}


CHAT = [{"messages": [says("system", "Be brief."), says("user", "Hi\n\nthere"), says("assistant", "Hello"),
                      says("user", "Bye"), says("assistant", "So long \u00fc"), says("user", "?")]},
        {"prompt": "1+1", "response": "2"}, {"prompt": "1+2", "completion": "3"},
        [says("user", "Plain"), says("assistant", "list")], {"instruction": "Add", "input": "2 3", "output": "5"},
        {"instruction": "Sing", "output": "La", "text": "as in Alpaca"}, {"text": "All of it.", "prompt": "no answer"}]
CHAT_TEXT = ["System: Be brief.\n\nUser: Hi\n\nthere\n\nAssistant:[ Hello~]User: Bye\n\nAssistant:[ So long \u00fc~]",
             "User: 1+1\n\nAssistant:[ 2~]", "User: 1+2\n\nAssistant:[ 3~]", "User: Plain\n\nAssistant:[ list~]",
             "User: Add\n\n2 3\n\nAssistant:[ 5~]", "User: Sing\n\nAssistant:[ La~]",
             "[All of it.~]"]


def prepare_marked(split):
    """A split of data/mine as text, with [ ] around the tokens that count in the loss and ~ for end-of-text."""
    tok, ids = bpe.Tokenizer.load("data/mine/tokenizer.json"), np.fromfile(f"data/mine/{split}.bin", np.uint16)
    mask, out, on = np.fromfile(f"data/mine/{split}.mask", np.uint8), b"", 0
    assert len(ids) == len(mask)
    for i, m in zip(ids, mask):
        token = b"~" if i == tok.special_tokens["<|endoftext|>"] else tok.decode_bytes([i])
        out, on = out + (b"" if m == on else b"[" if m else b"]") + token, m
    return (out + b"]" * on).decode().replace("~][", "~")


@pytest.mark.parametrize("unit", [50, 1 << 20])
def test_prepare_answers_count_and_questions_do_not(here, monkeypatch, unit):
    monkeypatch.setattr(prepare, "UNIT", unit)
    prepare_files("in", {"a.jsonl": "".join(json.dumps(c) + "\n" for c in CHAT)})
    meta = prepare_run(val_fraction=0.4)
    found = prepare_marked("train") + prepare_marked("val")
    for text in CHAT_TEXT: assert text.strip("[]") in found.replace("~[", "~") or text in found
    for split in ("train", "val"):
        inside = "".join(re.findall(r"\[(.*?)\]", prepare_marked(split), re.S))
        mask = np.fromfile(f"data/mine/{split}.mask", np.uint8)
        assert meta["answers"]["tokens"][split] == mask.sum()
        assert meta["answers"]["bytes"][split] == len(inside.replace("~", "").encode())
    assert meta["form"] == "answers" and meta["tokens"]["train"] == os.path.getsize("data/mine/train.mask")
    whole = open("data/mine/val.mask", "rb").read()
    open("data/mine/val.mask", "wb").write(whole[:-1])
    with pytest.raises(ValueError, match="val.mask has"): prepare.verify(prepare_cfg(val_fraction=0.4))
    prepare_files("in", {"a.jsonl": "".join(json.dumps({"text": str(i) * 9}) + "\n" for i in range(9))})
    assert "form" not in prepare_run(val_fraction=0.4) and not glob.glob("data/mine/*.mask")      # plain text has no mask


def test_prepare_preference_pairs(here):
    """A prompt with its chosen answer, then the same prompt with the rejected one; only the answers count."""
    pairs = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(20)]
    prepare_files("in", {"a.jsonl": "\n".join(map(json.dumps, pairs))})
    assert prepare_run()["form"] == "pairs"
    found = prepare_marked("train") + prepare_marked("val")
    for i in range(20): assert f"User: {i}?\n\nAssistant:[ yes {i}~]User: {i}?\n\nAssistant:[ no~]" in found
    prepare_files("in", {"b.jsonl": '{"text": "another"}'})
    with pytest.raises(ValueError, match="a dataset of their own"): prepare_run()


@pytest.mark.parametrize("line", [
    {"messages": []}, {"messages": [says("user", "x")]}, {"messages": [says("assistant", 3)]}, {"messages": "hi"},
    {"messages": [says("user", 3), says("assistant", "x")]}, {"prompt": "x"}, {"prompt": "x", "chosen": "y"},
    {"instruction": "x"}])
def test_prepare_bad_conversations_are_named(here, line):
    prepare_files("in", {"a.jsonl": '{"prompt": "x", "response": "y"}\n' + json.dumps(line)})
    with pytest.raises(ValueError, match='in/a.jsonl, line 2: not a JSON object with "text", "mess') as e: prepare_run()
    assert "\n" not in str(e.value)
    prepare_files("in", {"a.jsonl": '{"id": 1, "conversations": [{"from": "human", "value": "x"}]}'})
    with pytest.raises(ValueError, match=re.escape("it has ['id', 'conversations']")): prepare_run()


def test_prepare_text_that_changes_meanwhile_is_an_error(here, monkeypatch):
    choose = prepare.choose
    lines, one_of_that_length = '{"text": "a"}\n{"text": "b"}\n', '{"text": "a b"}\n             '
    for old, new in ((lines, one_of_that_length), ("some text", "some"), ("as long", "another")):
        name = "x.jsonl" if "{" in old else "x.txt"
        prepare_files("in", {name: old, "y.txt": "y"})
        monkeypatch.setattr(prepare, "choose", lambda *a: (prepare_files("in", {name: new}), choose(*a))[1])
        with pytest.raises(ValueError, match="changed while it was being read: run again"): prepare_run()
        assert not prepare.prepared(prepare_cfg()) and not glob.glob("data/mine/.partial-*/tokenizer.json")     # its text is gone


def test_prepare_in_a_folder_that_cannot_be_written_to(here, monkeypatch, capsys):
    """As root may write everywhere, the lock is what fails here."""
    prepare_files("in", {f"{i}.txt": prepare_text(i, 100) for i in range(9)})
    prepare_run()
    monkeypatch.setattr(prepare, "lock", raising(PermissionError(13, "Permission denied")))
    prepare_run()
    assert "data/mine is prepared already, nothing to do" in capsys.readouterr().out


def test_prepare_odd_files(here, monkeypatch, capsys):
    """Byte order marks are dropped; endings in capitals and names with bad UTF-8 or a newline are read; pipes and broken or
    circular links are not. ~ is the home folder, and a comma too many does not matter."""
    monkeypatch.setenv("HOME", str(here))
    prepare_files("in", {"a.JSONL": b'\xef\xbb\xbf{"text": "marked"}\r\n{"text": "next"}\r\n',
                         "two\nlines.txt": b"\xef\xbb\xbfx", os.fsdecode(b"\xff.md"): "y"})
    prepare_files("more", {"UP.TXT": "z <|endoftext|>"})
    os.mkfifo("in/pipe.txt")
    os.symlink("nowhere", "in/link.txt")
    os.symlink(".", "in/loop")
    with monkeypatch.context() as m, pytest.raises(PermissionError):     # a folder that cannot be read is not left out
        m.setattr(os, "scandir", raising(PermissionError(13, "Permission denied")))
        prepare.walk("in")
    meta = prepare_run(input="in, ~/more/UP.TXT,")
    assert sorted(prepare_documents(meta, "train")[0] + prepare_documents(meta, "val")[0]) == [
        b"marked", b"next", b"x", b"y", b"z <|endoftext|>"]
    assert f"note: <|endoftext|> in {here}/more/UP.TXT is ordinary text" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [
    b"", b"{}", b"3", b"null", b"[1]", b"\xff",
    b"[99, [0, 0]]", b"[-1, [0, 0]]", b"[1, [-1, -5]]", b"[1, [0]]", b'[1, ["", 0]]'])      # units done, tokens of each split
def test_prepare_damaged_state_starts_over(here, monkeypatch, damage):
    """Whatever state.json of an interrupted run contains, the next run gives the same bytes as one from the beginning."""
    monkeypatch.setattr(prepare, "UNIT", 2000)
    prepare_files("in", {f"{i:03d}.txt": prepare_text(i, 100) for i in range(20)})
    expect = prepare_run(dataset="whole")["sha256"]
    with monkeypatch.context() as m:
        m.setattr(prepare.shutil, "rmtree", lambda path: None)
        prepare_run()
    partial, = glob.glob("data/mine/.partial-*")
    for name in ("meta.json", "train.bin", "val.bin"): os.replace(f"data/mine/{name}", f"{partial}/{name}")
    os.replace("data/mine/tokenizer.json", f"{partial}/tokenizer.json")
    with open(f"{partial}/state.json", "wb") as f: f.write(damage)
    assert prepare_run()["sha256"] == expect


def test_prepare_two_runs_at_once(here):
    prepare_files("in", {f"{i:03d}.txt": prepare_text(i, 200) for i in range(300)})
    runs = [subprocess.Popen(PREPARE_COMMAND, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    said = [p.communicate(timeout=60)[0] for p in runs]
    assert [p.returncode for p in runs] == [0, 0], said
    assert sum("waiting for it" in text and "prepared already" in text for text in said) == 1
    assert len(prepare_hashes("data/mine")) == 4
    prepare_verify(prepare_cfg(vocab_size=400))


def test_prepare_verify(here):
    """Data on the disk that does not fit the knobs or its own meta.json is refused, with the remedy: run prepare.py."""
    assert not prepare.prepared(prepare_cfg())
    with pytest.raises(FileNotFoundError, match="is not prepared"): prepare.verify(prepare_cfg())
    prepare_files("in", {f"{i:03d}.txt": prepare_text(i, 20) for i in range(40)})
    meta = prepare_run()
    assert prepare.verify(prepare_cfg(input="")) == meta            # a later run need not repeat --input
    for key, value in (("vocab_size", 301), ("split_pattern", "gpt4"), ("val_fraction", 0.2), ("input", "other"),
                       ("tokenizer", "gpt2")):
        with pytest.raises(ValueError, match=f"prepared with {key}=.*not {value!r}: run prepare.py"):
            prepare.verify(prepare_cfg(**{key: value}))
    tokenizer = dict(tokenizer="data/mine/tokenizer.json", dataset="again")
    with pytest.raises(ValueError, match="has 300 tokens: set"): prepare.main(prepare_cfg(**tokenizer, vocab_size=299))
    again = prepare_run(**tokenizer, vocab_size=320)
    assert again["vocab_size"] == 300 and again["sha256"] == meta["sha256"] and again["tokenizer_hash"] == meta["tokenizer_hash"]
    with pytest.raises(ValueError, match="300 tokens: set --vocab_size=300"): prepare.verify(prepare_cfg(**tokenizer, vocab_size=299))
    for size in (-2, 2):
        with open("data/mine/val.bin", "r+b") as f: f.truncate(2 * meta["tokens"]["val"] + size)
        with pytest.raises(ValueError, match="val.bin has .* bytes, not .*: run prepare.py"): prepare.verify(prepare_cfg())
    assert prepare_run() == meta                                    # it prepares again
    for damage in (json.dumps(meta)[:30], "{}", "[]", "5", '{"knobs": 5}', json.dumps({"knobs": meta["knobs"]}), "[" * 100000):
        Path("data/mine/meta.json").write_text(damage)
        with pytest.raises(ValueError, match="meta.json is damaged: run prepare.py"): prepare.verify(prepare_cfg())
        assert prepare_run() == meta
    for damage in (lambda path: os.remove(path), lambda path: bpe.Tokenizer([]).save(path)):
        damage("data/mine/tokenizer.json")
        with pytest.raises(ValueError, match="tokenizer.json is missing or damaged: run"): prepare.verify(prepare_cfg())
        assert prepare_run() == meta
    os.remove("data/mine/train.bin")
    with pytest.raises(ValueError, match="train.bin has 0 bytes"): prepare.verify(prepare_cfg())


def test_prepare_vocabulary_beyond_uint16_is_refused(here):
    prepare_files("in", {"a.txt": "a", "b.txt": "b"})
    Tokenizer([], special_tokens={"<|endoftext|>": 256}, tokens=BPE_BYTES | {b"ab": 70000}).save("big.json")
    with pytest.raises(ValueError, match="70001 tokens, uint16 holds 65536"):
        prepare.main(prepare_cfg(tokenizer="big.json", vocab_size=100000))


def test_prepare_what_gets_its_name_is_on_the_disk_whole(here, monkeypatch):
    """A file is renamed only after an fsync of all its bytes; otherwise a power cut could leave the name without the contents."""
    synced, named, fsync, replace = {}, [], os.fsync, os.replace
    def spied_fsync(fd):
        fsync(fd)
        synced[os.fstat(fd).st_ino] = os.fstat(fd).st_size
    def spied_replace(old, new):
        assert synced.get(os.stat(old).st_ino) == os.stat(old).st_size, new
        named.append(os.path.basename(new))
        replace(old, new)
    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    prepare_files("in", {f"{i}.txt": prepare_text(i, 20) for i in range(20)})
    prepare_run()
    with prepare_server(PREPARE_BODY, ["cut", "whole"]) as server:
        prepare.fetch(server.url, str(here / "new" / "fetched"), wait=0.01)
    model_py.save_checkpoint(str(here / "ckpt.pt"), dict(model=tiny_gpt().state_dict()))
    assert {"train.bin", "val.bin", "meta.json", "tokenizer.json", "state.json", "fetched", "ckpt.pt"} == set(named)
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
    before = os.listdir()
    with pytest.raises(OSError, match="No space"): Tokenizer([]).save("tok.json")
    assert os.listdir() == before                                       # no half file is left on the full disk


def test_prepare_keeps_the_old_dataset_until_the_new_one_is_whole(here, monkeypatch):
    prepare_files("in", {f"{i:03d}.txt": prepare_text(i, 20) for i in range(40)})
    monkeypatch.setitem(sys.modules, "fcntl", None)                 # as on Windows
    prepare_run()
    old = prepare_hashes("data/mine")
    monkeypatch.setattr(prepare, "write_bins", raising(OSError(28, "No space left on device")))
    with pytest.raises(OSError): prepare_run(vocab_size=310)
    assert old == {name: prepare.sha256(f"data/mine/{name}") for name in old}
    prepare_verify(prepare_cfg())


def test_prepare_disk_space_is_checked_first(here, monkeypatch):
    prepare_files("in", {"a.txt": "x " * 100000})
    usage = types.SimpleNamespace(free=300_000)                     # 200,000 bytes may become 200,000 ids of two bytes
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: os.stat(path) and usage)
    monkeypatch.setattr(bpe.Tokenizer, "train", None)
    with pytest.raises(ValueError, match="MB are free: make room"): prepare_run()
    with pytest.raises(ValueError, match="fineweb needs .*make room"): prepare.sources(prepare_cfg(dataset="fineweb", input=""))
    with prepare_server(PREPARE_BODY + b"!", ["whole"]) as server, pytest.raises(ValueError, match="make room"):
        prepare.fetch(server.url, "new/file")


@contextmanager
def served(Handler):
    """The address of a server on 127.0.0.1 with that handler."""
    Handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try: yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally: server.shutdown()


@contextmanager
def prepare_server(body, script, headers={}):
    """A server that follows `script`: one entry per request, the last one repeated. It notes where each begins."""
    ranges = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = script.pop(0) if len(script) > 1 else script[0]
            start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            ranges.append(start)
            if isinstance(kind, int): return self.send_error(kind)
            if start >= len(body) and kind != "norange": return self.send_error(416)
            data, total = (body, len(body)) if kind == "norange" else (body[start:], len(body))
            if kind == "long": data, total = data, total + 1000          # announces more than it sends
            if kind == "short": data, total = data[:-1000], total - 1000  # announces less than there is
            if kind == "garbage": data = bytes(len(data))
            self.send_response(200 if kind == "norange" else 206)
            if kind != "norange": self.send_header("Content-Length", str(total - start))
            elif not headers: self.send_header("Content-Length", str(total))      # some servers send no length
            span = f"bytes {start}-{total - 1}/{'*' if kind == 'star' else total}"
            if kind != "norange": self.send_header("Content-Range", span)
            for name, value in headers.items(): self.send_header(name, value)
            self.end_headers()
            try:
                if kind == "cut": self.wfile.write(data[:len(data) // 2])
                elif kind == "stall":
                    self.wfile.write(data[:len(data) // 2]); self.wfile.flush(); time.sleep(1.5)
                elif kind == "dead": time.sleep(0.6)
                else: self.wfile.write(data)
            except OSError: pass
            self.close_connection = True

    with served(Handler) as url: yield types.SimpleNamespace(url=url + "file", ranges=ranges)


PREPARE_BODY = random.Random(0).randbytes(300_000)


@pytest.mark.parametrize("script, error", [
    (["whole"], None), (["norange"], None), (["cut"] * 7 + ["whole"], None), (["cut", "norange"], None),
    (["stall", "whole"], None), ([500, 503, 429, "whole"], None), (["dead", "whole"], None),
    (["cut", 500, "stall", "cut", "whole"], None), (["long", "whole"], None), (["cut", "garbage", "whole"], None),
    (["cut", "star"], "another range"), (["short"], "sha256"), (["garbage"], "sha256"), ([404], "404"),
    ([500], "500"), (["dead"], "timed out"), (["long"], "1000 more expected|of 301,000 bytes"),
])
def test_prepare_fetch(tmp_path, monkeypatch, script, error):
    """A server that cuts off, stalls, refuses or lies: in the end the whole file by its hash, or one clear line and no file."""
    path, sha = str(tmp_path / "new" / "file.txt"), hashlib.sha256(PREPARE_BODY).hexdigest()
    for given, headers in ((sha, {}), ("", {"X-Linked-Etag": f'"{sha}"'})):
        with prepare_server(PREPARE_BODY, list(script), headers) as server:
            if error:
                with pytest.raises(ValueError, match=error) as e:
                    prepare.fetch(server.url, path, given, stall=0.3, tries=3, wait=0.01)
                assert f"Put the file at {path} by hand" in str(e.value) and "config/stdlib.py" in str(e.value)
                assert not os.path.exists(path)
                for name in os.listdir(tmp_path / "new"): os.remove(tmp_path / "new" / name)
            else:
                prepare.fetch(server.url, path, given, stall=0.3, tries=5, wait=0.01)
                assert open(path, "rb").read() == PREPARE_BODY and os.listdir(tmp_path / "new") == ["file.txt"]
                if script[0] == "cut" and script[1] != "norange": assert 141_000 < server.ranges[1] < 150_000    # resumed
                os.remove(path)


def test_prepare_fetch_says_why_there_is_no_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.time, "sleep", lambda s: None)
    with pytest.raises(ValueError, match="refused"): prepare.fetch("http://127.0.0.1:9/" + "long/" * 40, str(tmp_path / "x"))


def test_prepare_asks_for_safetensors_before_it_downloads(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install safetensors"): prepare.pretrained("gpt2-xl")


def test_prepare_fetch_goes_on_with_an_earlier_part(tmp_path, monkeypatch):
    path, sha = str(tmp_path / "f"), hashlib.sha256(PREPARE_BODY).hexdigest()
    parts = PREPARE_BODY[:1000], PREPARE_BODY, PREPARE_BODY + b"more", b"another file" * 100, b""
    for part, kind in itertools.product(parts, ("whole", "norange")):
        with open(path + ".part", "wb") as f: f.write(part)
        with prepare_server(PREPARE_BODY, [kind]) as server: prepare.fetch(server.url, path, sha, wait=0.01)
        assert open(path, "rb").read() == PREPARE_BODY and server.ranges[0] == max(len(part) - 1, 0)
        os.remove(path)


def test_prepare_shakespeare(here, monkeypatch, capsys):
    """One download serves both datasets; another text under the same name is used, with a note."""
    text = prepare_text(0, 2000).encode()
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA", hashlib.sha256(text).hexdigest())
    cfg = dict(dataset="shakespeare", input="")
    with prepare_server(text, ["cut", "whole"]) as server:
        monkeypatch.setattr(prepare, "SHAKESPEARE", server.url)
        meta = prepare_run(**cfg)
    assert sum(meta["bytes"].values()) == len(text) and open("data/shakespeare/input.txt", "rb").read() == text
    files = {path: path.read_bytes() for path in Path("data/shakespeare").iterdir()}
    char = prepare_run(dataset="shakespeare_char", input="", vocab_size=256)        # the same text in another folder, no download
    assert char["bytes"] == char["tokens"] == meta["bytes"] and char["dataset"] == "shakespeare_char"
    assert {path: path.read_bytes() for path in Path("data/shakespeare").iterdir()} == files
    with open("data/shakespeare/input.txt", "ab") as f: f.write(b"!")
    assert sum(prepare_run(**cfg)["bytes"].values()) == len(text) + 1                 # put there by hand: used, with a note
    assert capsys.readouterr().out.count("note: data/shakespeare/input.txt is not http") == 1
    os.remove("data/shakespeare/input.txt")
    with prepare_server(b"a proxy's login page", ["norange"]) as server:
        monkeypatch.setattr(prepare, "SHAKESPEARE", server.url)
        with pytest.raises(ValueError, match="sha256.*Put the file at data/shakespeare/input.txt by hand"): prepare_run(**cfg)


def test_prepare_tinystories(here, monkeypatch):
    """Stories are separated by end-of-text marks; the published split stands; stories in validation are not trained on."""
    monkeypatch.setattr(prepare, "UNIT", 400)
    stories = [prepare_text(i, 30).strip() for i in range(60)] + ["ends in <|endoftext|>", "two\n\nparts"]
    def joined(docs, end="\n"): return (end + f"{end}<|endoftext|>{end}{end}".join(docs) + f"{end}<|endoftext|>{end}").encode()
    names = [f"data/tinystories/TinyStoriesV2-GPT4-{name}.txt" for name in ("valid", "train")]
    prepare_files(".", {names[0]: joined(stories[:9]), names[1]: joined(stories[5:] + ["", stories[20]], "\r\n")})
    for workers in (1, 2):
        meta = prepare_run(dataset="tinystories", input="", workers=workers)
        assert prepare_documents(meta, "val")[0] == [s.encode() for s in stories[:9]]
        assert prepare_documents(meta, "train")[0] == [s.encode() for s in stories[9:]]
        assert (meta["duplicates"], meta["empty"]) == (5, 1)
        prepare.verify(prepare_cfg(dataset="tinystories", input="", val_fraction=0.5))      # ignored: its split is given
        os.remove("data/tinystories/meta.json")


def test_prepare_fineweb(here, monkeypatch):
    """Shards of ready tokens are checked and joined, and the bytes of their texts counted; a damaged shard is named."""
    tok = bpe.Tokenizer.train([prepare_text(0, 2000)], 300)         # in place of GPT-2's: both have end-of-text last
    monkeypatch.setattr(bpe.Tokenizer, "gpt2", classmethod(lambda cls: tok))
    eot, shards = tok.special_tokens["<|endoftext|>"], []
    for n in range(3):
        docs = [prepare_text(10 * n + i, 50).encode() for i in range(4 + n)]
        ids = np.array([i for doc in docs for i in (eot, *tok.encode(doc))], "<u2")
        head = np.zeros(256, "<i4")
        head[:3] = 20240520, 1, len(ids)
        shards.append((docs, ids, head.tobytes() + ids.tobytes()))
    cfg = dict(dataset="fineweb", input="", tokenizer="gpt2", num_shards=2)
    prepare_files("data/fineweb", {"fineweb_val_000000.bin": shards[0][2], "fineweb_train_000001.bin": shards[1][2]})
    with prepare_server(shards[2][2], ["cut", "whole"]) as server:
        monkeypatch.setattr(prepare, "FINEWEB", server.url + "?")
        meta = prepare_run(**cfg)
    assert np.fromfile("data/fineweb/val.bin", "<u2").tolist() == shards[0][1].tolist()
    assert np.fromfile("data/fineweb/train.bin", "<u2").tolist() == shards[1][1].tolist() + shards[2][1].tolist()
    assert meta["documents"] == {"val": 4, "train": 11} and meta["tokenizer"] == "gpt2" and meta["eot"] == eot
    assert meta["bytes"] == {"val": sum(map(len, shards[0][0])), "train": sum(map(len, shards[1][0] + shards[2][0]))}
    assert not os.path.exists("data/fineweb/tokenizer.json")
    with pytest.raises(ValueError, match="num_shards=2, not 1"): prepare.verify(prepare_cfg(**{**cfg, "num_shards": 1}))
    whole = shards[1][2]
    for bad in (whole[:-2], whole + b"xx", whole[:900], b"\0" + whole[1:], whole[:-2] + b"\xff\xff"):
        prepare_files("data/fineweb", {"fineweb_train_000001.bin": bad})
        os.path.exists("data/fineweb/meta.json") and os.remove("data/fineweb/meta.json")
        with pytest.raises(ValueError, match="train_000001.bin is not a whole shard"): prepare.main(prepare_cfg(**cfg))
        assert not prepare.prepared(prepare_cfg(**cfg))


def test_prepare_import_is_cheap():
    code = "import sys, prepare; assert not {'torch', 'requests', 'tiktoken'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ======================================================== flash_attn.py: attention_ref in float64; compiled code

# dtype: (largest relative error of the output, of the gradients)
FLASH_TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}


@pytest.fixture(autouse=True)
def flash_big_tiles(monkeypatch):
    """The interpreter takes as long for a small tile as for a large one: enlarge those of float32, which are small for a GPU."""
    if not flash_gpu: monkeypatch.setattr(flash_attn, "FLOAT32", {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (64, 64, 4, 1)})


def flash_tensors(B, H, K, T, S, D, dtype, layout="plain", seed=0):
    """q, k, v. packed: slices of one projection, (B, T, heads, D) in memory; odd: rows at odd addresses; expanded: one row of the
    batch, stride 0, seen B times; transposed: D is not the fastest dimension."""
    g = torch.Generator().manual_seed(seed)

    def make(heads, rows):
        if layout == "packed": return torch.randn(B, rows, 3, heads, D, generator=g)[:, :, 1].transpose(1, 2)
        if layout == "odd": return torch.randn(B, heads, rows, D + 1, generator=g)[..., 1:]
        if layout == "expanded": return torch.randn(1, heads, rows, D, generator=g).expand(B, -1, -1, -1)
        if layout == "transposed": return torch.randn(B, heads, D, rows, generator=g).transpose(2, 3)
        return torch.randn(B, heads, rows, D, generator=g)

    def cast(x):                                                        # keeps all strides, 0 and odd ones included
        if x.numel() == 0: return x.to(flash_device, dtype)
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        flat = torch.as_strided(x, (extent,), (1,)).to(flash_device, dtype)
        return torch.as_strided(torch.cat([flat.new_zeros(x.storage_offset()), flat]), x.shape, x.stride(), x.storage_offset())
    return [cast(make(*a)) for a in ((H, T), (K, S), (K, S))]


def flash_documents(B, T, S):
    starts = torch.arange(T) + S - T
    return torch.stack([(starts // n * n).clamp(min=0) for n in (40, 23, 70)][:B]).to(flash_device)


def flash_error(ours, ref):
    """Largest error over largest value. Values below 1, the size of a sum's terms, count as 1: sums may cancel exactly."""
    return ((ours.double() - ref).abs().max() / ref.abs().max().clamp_min(1.0)).item() if ref.numel() else 0.0


def flash_check(module, q, k, v, **mask):
    """The output and the three gradients against attention_ref in float64."""
    results, tolerance = [], FLASH_TOLERANCE[q.dtype]
    for function, cast in ((module.flash_attention, lambda x: x.detach()), (module.attention_ref, lambda x: x.detach().double())):
        leaves = [cast(x).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, **mask)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, q.dtype)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    assert all(a.isfinite().all() for a in results[0])
    errors = [flash_error(a, b) for a, b in zip(*results)]
    assert errors[0] <= tolerance[0] and max(errors[1:]) <= tolerance[1], f"relative errors of out, dq, dk, dv: {errors}"


def flash_pairs(*dimensions):
    """A few rows in which every pair of values of two dimensions occurs: [0, 1], [0, 1], [0, 1] -> 001, 010, 100, 111."""
    indexed = [list(range(len(d))) for d in dimensions]
    pairs = lambda row: {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}
    missing, rows = set().union(*map(pairs, itertools.product(*indexed))), []
    generator = torch.Generator().manual_seed(0)
    while missing:
        draw = lambda: tuple(int(torch.randint(len(d), (), generator=generator)) for d in indexed)
        i, a, j, b = min(missing)
        tries = [tuple(a if n == i else b if n == j else x for n, x in enumerate(draw())) for _ in range(60)]
        best = max(tries, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append(tuple(d[x] for d, x in zip(dimensions, best)))
    return rows


FLASH_MATRIX = flash_pairs(
    [(129, 129), (1, 129), (100, 129), (127, 17), (15, 15), (1, 1), (17, 1)],      # T, S: equal, T = 1, T < S, T > S
    [64, 40, 96, 128], [True, False], [(2, 2), (4, 2), (2, 1)],                    # D, causal, (H, K): MHA, GQA, MQA
    [(0, False), (20, False), (0, True), (30, True)],                              # window, documents
    ["plain", "packed", "odd", "expanded", "transposed"],
    [(torch.float32, 80), (torch.float16, 90), (torch.float16, 80), (torch.bfloat16, 90)])


@needs_flash
@pytest.mark.parametrize("lengths,D,causal,heads,mask,layout,kind", FLASH_MATRIX)
def test_flash_matrix(lengths, D, causal, heads, mask, layout, kind, monkeypatch):
    (T, S), (dtype, arch), B = lengths, kind, 1 + (layout == "expanded")
    if not flash_gpu: monkeypatch.setattr(flash_attn, "architecture", lambda device: arch)   # 90: descriptors, two query tiles
    q, k, v = flash_tensors(B, *heads, T, S, D, dtype, layout)
    flash_check(flash_attn, q, k, v, causal=causal, window=mask[0], doc_start=flash_documents(B, T, S) if mask[1] else None)


@needs_flash
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_flash_scale(scale):
    flash_check(flash_attn, *flash_tensors(1, 1, 1, 33, 47, 16, torch.float32), scale=scale)


@needs_flash
@pytest.mark.parametrize("arch", [80, 90])
def test_flash_large_scores_and_lone_document_starts(arch, monkeypatch):
    """Scores in the hundreds, whose exp overflows unless the maximum is subtracted; doc_start in any order."""
    if not flash_gpu: monkeypatch.setattr(flash_attn, "architecture", lambda device: arch)
    q, k, v = flash_tensors(2, 2, 1, 100, 150, 64, torch.float16)
    starts = torch.randint(-5, 160, (2, 100), generator=torch.Generator().manual_seed(0)).to(flash_device)
    for causal in (True, False): flash_check(flash_attn, q * 8, k, v, scale=1.0, doc_start=starts, causal=causal)


@needs_flash
@pytest.mark.parametrize("arch", [80, 90])
def test_flash_rows_that_see_nothing(arch, monkeypatch):
    if not flash_gpu: monkeypatch.setattr(flash_attn, "architecture", lambda device: arch)
    never = torch.tensor([2 ** 31 - 1, 2 ** 32] * 20, device=flash_device)[None]         # 2 ** 32 cast to 32 bits is 0
    for T, S, starts in ((130, 40, None), (40, 40, never)):
        q, k, v = [x.requires_grad_() for x in flash_tensors(1, 2, 1, T, S, 64, torch.float16)]
        out = flash_attn.flash_attention(q, k, v, doc_start=starts)
        grads = torch.autograd.grad(out.float().square().sum() + out.sum(), (q, k, v))
        blind = T if starts is not None else T - S
        assert (out[:, :, :blind] == 0).all() and (grads[0][:, :, :blind] == 0).all()
        assert all(x.isfinite().all() for x in (out, *grads)) and (starts is None or all((x == 0).all() for x in grads))
    for T, S in ((5, 0), (0, 5)):
        q, k, v = [x.requires_grad_() for x in flash_tensors(1, 2, 1, T, S, 64, torch.float16)]
        out = flash_attn.flash_attention(q, k, v)
        assert out.shape == q.shape and (out == 0).all()
        assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_flash_copy_engine_gets_only_what_it_can_load():
    """What would fail only on hardware: unaligned addresses and strides, rows in pieces, zero strides, tiles past the padding."""
    x = torch.zeros(2, 4, 32, 72, dtype=torch.float16)
    for good in (x, x[..., :64], x.transpose(1, 2)):
        assert flash_attn.copy_engine(90, x, good) and not flash_attn.copy_engine(80, good)
    rows_of_65 = x.flatten(2)[..., :65 * 32].view(2, 4, 32, 65)
    for bad in (x[..., 4:68], rows_of_65, x.mT, x[:1].expand(2, -1, -1, -1), x.float(), x[:, :0]):
        assert not flash_attn.copy_engine(90, x, bad)
    for which in ("dkdv", "dq"):
        for M, *_ in (tile for arch in flash_attn.TILES[which].values() for tile in arch.values()):
            assert flash_attn.new_stats(x).shape[2] % M == 0


@needs_flash
def test_flash_same_bits_every_time():
    for K in (1, 2):
        q, k, v = [x.requires_grad_() for x in flash_tensors(2, 2, K, 100, 129, 64, torch.float16)]
        mask = dict(window=70, doc_start=flash_documents(2, 100, 129))
        runs = []
        for _ in range(2):
            out = flash_attn.flash_attention(q, k, v, **mask)
            runs.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
        assert all(torch.equal(a, b) for a, b in zip(*runs))


@needs_flash
def test_flash_beyond_two_to_the_31():
    """Views that span more than 2^31 elements, the last even within a tile; the memory between their rows is never touched."""
    far = 2 ** 30 + 64
    room = torch.empty(far * 2 + 2 ** 29, dtype=torch.float16, device=flash_device)
    for (B, H, T, D), strides in (((3, 1, 20, 16), (far, 320, 16, 1)), ((1, 3, 20, 16), (320, far, 16, 1)),
                                  ((1, 1, 150, 16), (16, 16, 2 ** 24, 1)), ((1, 1, 70, 16), (16, 16, 2 ** 25 + 2 ** 20, 1))):
        q, k, v = [torch.as_strided(room, (B, H, T, D), strides, offset) for offset in (0, 1024, 2048)]
        for x, y in zip((q, k, v), flash_tensors(B, H, H, T, T, D, torch.float16)): x.copy_(y)
        args = [x.contiguous().double() for x in (q, k, v)]
        assert flash_error(flash_attn.flash_attention(q, k, v), flash_attn.attention_ref(*args)) < 2e-3
        leaves = [[x.detach().requires_grad_() for x in xs] for xs in ((q, k, v), args)]
        functions = (flash_attn.flash_attention, flash_attn.attention_ref)
        grads = [torch.autograd.grad(f(*x).sum(), x) for f, x in zip(functions, leaves)]
        assert max(flash_error(a, b) for a, b in zip(*grads)) < 2e-3
        n = T - 11
        ours = flash_attn.flash_decode(q[:, :, :1], k, v, torch.tensor([T, T, n][-B:], device=flash_device))
        ref = flash_attn.attention_ref(args[0][-1:, :, :1], args[1][-1:, :, :n], args[2][-1:, :, :n])
        assert flash_error(ours[-1:], ref) < 2e-3


@needs_flash
@pytest.mark.parametrize("heads,T,S,window,dtype", [((2, 2), 1, 700, 0, torch.float16), ((8, 2), 1, 700, 100, torch.float32),
                                                    ((4, 1), 5, 300, 0, torch.bfloat16), ((6, 2), 30, 333, 40, torch.float16)])
def test_flash_decode(heads, T, S, window, dtype):
    """Rows of different lengths in one cache. Beyond each length the cache is NaN, so that reading it would show."""
    q, k, v = flash_tensors(4, *heads, T, S, 40, dtype, layout="packed")
    lengths = torch.tensor([S + 70, S // 2 + 3, max(T, 2), T // 2], device=flash_device)       # beyond S counts as S
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = float("nan")
        v[b, :, n:] = float("nan")
    mask = dict(window=window, scale=0.2 if window else None)
    out = flash_attn.flash_decode(q, k, v, lengths, **mask)
    for b, n in enumerate(lengths.tolist()):
        ref = flash_attn.attention_ref(*[x[b:b + 1].double() for x in (q, k[:, :, :n], v[:, :, :n])], **mask)
        assert flash_error(out[b:b + 1], ref) <= FLASH_TOLERANCE[dtype][0]


@needs_flash
def test_flash_autocast_is_torchs():
    """Under autocast the kernels run in its type, whatever q, k and v are, also compiled; gradients have the types of q, k, v."""
    q, k, v = flash_tensors(1, 2, 1, 20, 33, 16, torch.float32)
    leaves, lengths = [x.requires_grad_() for x in (q, k.half(), v)], torch.tensor([30], device=flash_device)
    attend = lambda *x: (flash_attn.flash_attention(*x, window=9), flash_attn.flash_decode(*[y.detach() for y in x], lengths))
    want = attend(*[x.half() for x in leaves])
    with torch.autocast(flash_device.type, torch.float16):
        got = attend(*leaves)
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
        with pytest.raises(ValueError, match="torch.float64"): attend(*[x.double() for x in leaves])       # torch SDPA: float64
        with pytest.raises(ValueError, match="torch.int32"): attend(*[x.int() for x in leaves])
        with pytest.raises(ValueError, match="on meta"): attend(*[x.to("meta") for x in leaves])
    assert all(x.dtype == torch.float16 and torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(want, got, compiled))
    grads, wanted = [torch.autograd.grad(x[0].float().square().sum(), leaves) for x in (got, want)]
    assert all(torch.equal(x, y) and x.dtype == leaf.dtype for x, y, leaf in zip(grads, wanted, leaves))


@needs_flash
def test_flash_functional_derivatives():
    """Forward mode, which PyTorch would take for zero, raises; vmap works."""
    q, k, v = flash_tensors(3, 2, 1, 5, 9, 16, torch.float32)
    attend, lengths = flash_attn.flash_attention, torch.tensor([9, 9, 9], device=flash_device)
    for function, x in ((lambda x: attend(x, k, v), q), (lambda x: attend(q, x, v), k), (lambda x: attend(q, k, x), v),
                        (lambda x: flash_attn.flash_decode(x, k, v, lengths), q)):
        for derivative in (lambda: torch.func.jvp(function, (x,), (x,)), lambda: torch.func.jacfwd(function)(x),
                           lambda: torch.compile(lambda x: torch.func.jvp(function, (x,), (x,)), backend="aot_eager")(x)):
            with pytest.raises(ValueError, match="no forward-mode derivative"): derivative()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                 # vmap is a loop
        out = torch.vmap(attend)(*[x[:, None] for x in (q, k, v)])[:, 0]
    assert flash_error(out, flash_attn.attention_ref(*[x.double() for x in (q, k, v)])) < 2e-6


@needs_flash
def test_flash_recipes_for_doc_start():
    """The docstring's: packed sequences (one empty) and rows padded on the left equal each sequence alone."""
    packed, padded = "cu[:-1].repeat_interleave(cu.diff(), output_size=T)[None]", "pads[:, None].expand(B, T)"
    assert packed in flash_attn.flash_attention.__doc__ and padded in flash_attn.flash_attention.__doc__
    B, T, ref = 2, 21, lambda *x: flash_attn.attention_ref(*[y.double() for y in x])
    cu, pads = torch.tensor([0, 8, 8, 9, 21], dtype=torch.int32, device=flash_device), torch.tensor([4, 0], device=flash_device)
    q, k, v = flash_tensors(B, 2, 1, T, T, 16, torch.float32)
    out = flash_attn.flash_attention(q[:1], k[:1], v[:1], doc_start=eval(packed, dict(cu=cu, T=T)))
    for a, b in ((0, 8), (8, 9), (9, 21)):
        assert flash_error(out[:, :, a:b], ref(*[x[:1, :, a:b] for x in (q, k, v)])) < 2e-6
    out = flash_attn.flash_attention(q, k, v, doc_start=eval(padded, dict(pads=pads, B=B, T=T)))
    for b, n in enumerate(pads.tolist()):
        assert (out[b, :, :n] == 0).all()
        assert flash_error(out[b:b + 1, :, n:], ref(*[x[b:b + 1, :, n:] for x in (q, k, v)])) < 2e-6


@needs_flash
def test_flash_gradcheck():
    """Gradients against finite differences of the forward, with wide steps, as the kernels have no more than float32."""
    for T, S, H, mask in ((2, 3, 2, {}), (3, 3, 1, dict(causal=False, window=2))):
        inputs = [x.requires_grad_() for x in flash_tensors(1, H, 1, T, S, 2, torch.float32)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                             # gradcheck would prefer float64
            attend = lambda *x: flash_attn.flash_attention(*x, **mask)
            assert torch.autograd.gradcheck(attend, inputs, eps=1e-2, atol=1e-3, rtol=1e-3)


@needs_flash
def test_flash_operators():
    q, k, v = [x.requires_grad_() for x in flash_tensors(1, 2, 1, 5, 9, 16, torch.float32)]
    documents = torch.zeros(1, 5, dtype=torch.int32, device=flash_device)
    for args in ((q, k, v, True, 0, 0.25, None), (q, k, v, False, 3, 0.25, documents)):
        torch.library.opcheck(flash_attn.forward_op, args)
        saved = [x.detach() for x in (q, k, v, *flash_attn.forward_op(*args))]
        torch.library.opcheck(flash_attn.backward_op, (saved[3], *saved, *args[3:]))
    lengths = torch.tensor([7], dtype=torch.int32, device=flash_device)
    torch.library.opcheck(flash_attn.decode_op, (q.detach(), k.detach(), v.detach(), lengths, 0, 0.25))


@needs_flash
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
def test_flash_compiles_whole(backend):
    def block(x, w, lengths):
        q, k, v = (x @ w).view(x.shape[0], x.shape[1], 3, 2, 16).permute(2, 0, 3, 1, 4)
        assert flash_attn.why_not(q, k, v) is None
        y = flash_attn.flash_attention(q, k, v, x.shape[1] > 1, x.shape[1] - 3)        # symbolic, too
        y = y + flash_attn.flash_decode(q.detach(), k.detach(), v.detach(), lengths)
        return y.transpose(1, 2).reshape(x.shape).square().sum()

    torch._dynamo.reset()
    torch.manual_seed(0)
    x, w = [torch.randn(*shape, device=flash_device, requires_grad=True) for shape in ((2, 12, 32), (32, 96))]
    lengths = torch.tensor([12, 12], device=flash_device)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for n in (12, 10):                                                  # the second length makes T symbolic
        a, b = [torch.autograd.grad(f(x[:, :n], w, lengths * 0 + n), (x, w)) for f in (block, compiled)]
        assert max(flash_error(p, q.double()) for p, q in zip(a, b)) < 1e-5


@needs_flash
@pytest.mark.parametrize("strict", [True, False])
def test_flash_exports_with_symbolic_lengths(strict):
    class Attend(torch.nn.Module):
        def forward(self, q): return flash_attn.flash_attention(q, q, q, q.shape[2] > 7, q.shape[2] - 3)

    inputs, shapes = [flash_tensors(1, 2, 2, T, T, 16, torch.float32)[0] for T in (9, 12)], ({2: torch.export.Dim("T", min=8)},)
    exported = torch.export.export(Attend(), (inputs[0],), dynamic_shapes=shapes, strict=strict).module()
    for q in inputs: assert torch.equal(exported(q), Attend()(q))


@needs_flash
def test_flash_says_what_is_wrong():
    q, k, v = flash_tensors(1, 4, 2, 5, 9, 16, torch.float32)
    attend = flash_attn.flash_attention
    odd = [(q[:, :3], k, v), (q[0], k, v), (q, k[0], v[0]), (q, k[:, :0], v[:, :0]), (q, k[..., :8], v[..., :8]),
           (q.repeat(2, 1, 1, 1), k, v)]
    for match, call in (*[("multiple of K", lambda x=x: attend(*x)) for x in odd],
                        ("head dim is 0", lambda: attend(*[x[..., :0] for x in (q, k, v)])),
                        ("must be one of", lambda: attend(q, k, v.half())), ("on one device", lambda: attend(q, k.to("meta"), v)),
                        (r"\(B, K, S, D\)", lambda: attend(q, k, v[:, :, :3])),
                        ("window is -1", lambda: attend(q, k, v, window=-1)), ("must be one of", lambda: attend(q.half(), k, v)),
                        ("window is True", lambda: attend(q, k, v, window=True)), ("window is None", lambda: attend(q, k, v, window=None)),
                        (r"window is \(3, 0\)", lambda: attend(q, k, v, window=(3, 0))),
                        ("window is 2.0", lambda: flash_attn.flash_decode(q, k, v, torch.tensor([9]), 2.0)),
                        ("causal is None: True or False; there is no mask", lambda: attend(q, k, v, None)),     # SDPA's attn_mask
                        ("causal is tensor", lambda: attend(q, k, v, torch.ones(5, 9, dtype=torch.bool))),
                        ("causal is 0.0", lambda: attend(q, k, v, 0.0)), ("causal is 1", lambda: attend(q, k, v, 1)),
                        ("scale is a tensor", lambda: attend(q, k, v, scale=torch.tensor(0.3, requires_grad=True))),
                        ("scale is a tensor", lambda: flash_attn.flash_decode(q, k, v, torch.tensor([9]), 0, torch.tensor(0.3))),
                        ("must be one of", lambda: attend(q.double(), k.double(), v.double())),
                        ("head dim is 512", lambda: attend(*flash_tensors(1, 1, 1, 1, 1, 512, torch.float32))),
                        ("doc_start is", lambda: attend(q, k, v, doc_start=torch.zeros(1, 4, dtype=torch.int32))),
                        ("doc_start is", lambda: attend(q, k, v, doc_start=torch.zeros(1, 5))),
                        ("lengths is", lambda: flash_attn.flash_decode(q, k, v, torch.tensor([True]))),
                        ("lengths is", lambda: flash_attn.flash_decode(q, k, v, torch.tensor([9, 9])))):
        with pytest.raises(ValueError, match=match) as error: call()
        assert "\n" not in str(error.value)
    assert flash_attn.why_not(q, k, v) is None and "dropout" in flash_attn.why_not(q, k, v, 0.1)
    reason = flash_attn.why_not(*[x.to("meta") for x in (q, k, v)])
    assert "meta" in reason and "TRITON_INTERPRET=1, set before Python starts" in reason


def flash_python(code, *args, **env):
    """Start code in a new Python process without TRITON_INTERPRET."""
    env = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "OMP_NUM_THREADS": "1", **env}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=HERE, env=env, text=True, **pipes)


def test_flash_without_triton():
    out, error = flash_python("""
import sys, torch
sys.modules["triton"] = None                # import triton raises ImportError
import flash_attn
x = torch.randn(1, 1, 2, 16)
assert flash_attn.attention_ref(x, x, x).shape == x.shape
try: flash_attn.flash_attention(x, x, x)
except ValueError as e: print(e)
flash_attn.report()
""").communicate(timeout=100)
    assert "Triton is not installed: pip install triton" in out, error
    assert error.splitlines()[-1].startswith("Triton is not installed") and "Traceback" not in error


@needs_flash
def test_flash_report_under_the_interpreter_says_so():
    out, error = flash_python("import flash_attn; flash_attn.report()", TRITON_INTERPRET="1").communicate(timeout=100)
    assert not out and error.splitlines()[-1].startswith("TRITON_INTERPRET is set") and "Traceback" not in error


def test_flash_says_what_triton_lacks_to_build_its_launchers(monkeypatch, tmp_path):
    monkeypatch.setattr(flash_attn, "triton", flash_attn.triton or True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler: install gcc" in flash_attn.missing_tool()
    (tmp_path / "gcc").touch(0o755)
    monkeypatch.setattr(flash_attn.sysconfig, "get_path", lambda *args: str(tmp_path))
    assert f"needs {tmp_path / 'Python.h'}: install Python's headers" in flash_attn.missing_tool()
    (tmp_path / "Python.h").touch()
    assert flash_attn.missing_tool() is None
    (tmp_path / "gcc").unlink()
    monkeypatch.setenv("CC", "cc")
    assert flash_attn.missing_tool() is None
    # on a GPU, the model then takes SDPA, and says so
    model = model_py.GPT(tiny())
    monkeypatch.setattr(flash_attn, "MISSING", "Triton lacks X")
    weight = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(model.transformer.wte, "forward", None)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: types.SimpleNamespace(
        dtype=torch.bfloat16, shape=shape, device=torch.device("cuda")))
    monkeypatch.setitem(model.transformer.wte._parameters, "weight", weight)
    assert model.set_backend() == "torch SDPA (Triton lacks X)" and model.backend == "sdpa"
    assert model_py.why_not_compile(torch.device("cuda")) == "Triton lacks X"


FLASH_AHEAD = r"""
import json, pathlib, re, subprocess, sys, tempfile
import torch, triton, flash_attn
arch, found = int(sys.argv[1]), []
tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
masked, fp16 = dict(window=256, docs=True, K=2), dict(causal=False, dtype=torch.float16)
configurations = [(64, {}), (128, {})] + {80: [(64, masked)], 90: [(256, {}), (128, masked), (128, fp16)], 100: [(64, fp16)]}[arch]
if sys.argv[2] == "all":
    configurations += [(64, masked), (128, masked), (256, {}), (64, fp16), (128, fp16)]
    configurations += [(80, dict(T=1, S=1, H=1, K=1, causal=False))]
    configurations += [(40, dict(causal=False, aligned=False)), (64, dict(dtype=torch.float32))] if arch == 80 else []
for D, kw in configurations:
    for name, kernel in flash_attn.shipped(arch, D, **kw):
        if name in ("forward", "dkdv", "dq") or not kw:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
                f.write(kernel.asm["cubin"]); f.flush()
                sass = subprocess.run([tools / "cuobjdump", "-sass", f.name], capture_output=True, text=True, check=True).stdout
            ptx = kernel.asm["ptx"]
            sizes = set(re.findall(r"cp\.async\.c\w\.shared\.global.*, (%r\d+);", ptx))     # bytes: 0 past the end
            found.append(dict(flash_attn.usage(kernel, arch), arch=arch, D=D, name=name, kw=str(kw), tma="cp.async.bulk" in ptx,
                              guarded=all(re.search(rf"selp\.b32\s+{size},", ptx) for size in sizes),
                              hgmma=" HGMMA" in sass, hmma=" HMMA" in sass, tcgen05="tcgen05.mma" in ptx))
print(json.dumps(found))
"""


@needs_flash
def test_flash_compiles_ahead_of_time():
    """The kernels compiled for three generations of GPU, without needing one: no spills (8 bytes in Triton 3.6 for rows at odd
    addresses), the generation's matrix instructions, no serialised wgmma, shared memory that fits, and no unguarded
    prefetch for a loop iteration that may never come: it read past the tensor's end and overlapped what the kernel did next."""
    limit = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}            # 99K: as on compute capability 8.6, 8.9 and 12.0
    scope = "all" if os.cpu_count() >= 8 else "most"                    # each takes seconds
    processes = [flash_python(FLASH_AHEAD, str(arch), scope) for arch in limit]
    for process in processes:
        out, error = process.communicate(timeout=550)
        assert process.returncode == 0, error[-2000:]
        for k in json.loads(out):
            odd = "aligned" in k["kw"] and flash_attn.triton.__version__ < "3.7"
            assert k["spilled"] <= 8 * odd and not k["warnings"] and k["guarded"], k
            assert k["shared"] <= limit[k["arch"]] and k["programs"] >= 1, k
            if k["name"] in ("forward", "dkdv", "dq") and "float32" not in k["kw"]:
                aligned = "aligned" not in k["kw"]
                assert k["tma"] == (k["arch"] >= 90 and aligned), k
                if aligned: assert k[{80: "hmma", 90: "hgmma", 100: "tcgen05"}[k["arch"]]], k


FLASH_MUTATIONS = {
    "the sum is not rescaled": ("a * alpha[:, None]", "a"),
    "the weights' sum is not rescaled": ("l * alpha + tl.sum(p, 1)", "l + tl.sum(p, 1)"),
    "the diagonal is one too low": ("tl.maximum(rows + (S - T + 1), 0)", "tl.maximum(rows + (S - T), 0)"),
    "the diagonal is one too high": ("tl.maximum(rows + (S - T + 1), 0)", "tl.maximum(rows + (S - T + 2), 0)"),
    "the last block is skipped": ("tl.maximum(tl.cdiv(stop, BLOCK), first)", "tl.maximum(tl.cdiv(stop, BLOCK) - 1, first)"),
    "an edge block passes for full": ("tl.cdiv(full_start, BLOCK)", "(full_start // BLOCK)"),
    "the window is one too wide": ("tl.maximum(rows + (S - T + 1) - window, 0)", "tl.maximum(rows + (S - T) - window, 0)"),
    "dk forgets delta": ("(dot(v, do.T, zero) - tl.load(Delta + stats)[None, :])", "dot(v, do.T, zero)"),
    "dq forgets delta": ("(dot(do, v.T, zero) - delta)", "dot(do, v.T, zero)"),
    "dk and dv see one head of the group": ("kv * G + g, block", "kv * G + 0 * g, block"),
    "dk and dv stop early": ("tl.minimum(T, n_last - past + window)", "tl.minimum(T, n_last - past + window - 64)"),
    "dv ignores the mask": ("p = hide(p, n + tl.arange(0, BLOCK_N)[:, None]", "p_ = hide(p, n + tl.arange(0, BLOCK_N)[:, None]"),
    "documents end a block early": ("torch.searchsorted(falling, first + block)", "torch.searchsorted(falling, first)"),
    "the parts of decode weigh the same": ("w = tl.exp2(lse - ", "w = tl.exp2(0 * lse - 0 * "),
}


def flash_small_check(module):
    """A few cases, at least one of which every mutation must fail."""
    q, k, v = flash_tensors(1, 2, 1, 70, 130, 16, torch.float16)
    flash_check(module, q, k, v)
    flash_check(module, q, k, v, window=70, doc_start=flash_documents(1, 70, 130))
    flash_check(module, q, k, v, causal=False, window=40)
    k, v = [x.repeat(1, 1, 3, 1) for x in (k, v)]
    out = module.flash_decode(q[:, :, :1], k, v, torch.tensor([390], device=flash_device))
    assert flash_error(out, module.attention_ref(q[:, :, :1].double(), k.double(), v.double())) < 2e-3


@needs_flash
@pytest.mark.parametrize("name", ["nothing", *FLASH_MUTATIONS])
def test_flash_mutations_are_caught(name, tmp_path, monkeypatch):
    source = (Path(HERE) / "flash_attn.py").read_text().replace("flash_attn_py::", "flash_mutant::")      # own operator names
    old, new = FLASH_MUTATIONS.get(name, ("", ""))
    assert source.count(old) >= 1, f"{old!r} is no longer in flash_attn.py: bring the mutation up to date"
    path = tmp_path / "flash_mutant.py"
    path.write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location("flash_mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "flash_mutant", mutant)
    spec.loader.exec_module(mutant)
    with nullcontext() if name == "nothing" else pytest.raises(AssertionError): flash_small_check(mutant)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D,T,S,H,K,causal", [
    (64, 1024, 1024, 8, 8, True), (128, 2000, 2000, 8, 2, True), (96, 333, 1777, 4, 1, True), (64, 512, 4096, 4, 4, False),
    (128, 4096, 4096, 4, 4, True)])
def test_flash_gpu_accuracy(dtype, D, T, S, H, K, causal):
    """Errors against float64 are at most twice those of PyTorch in the same type, plus two units in the last place."""
    q, k, v = flash_tensors(2, H, K, T, S, D, dtype, layout="packed")
    dout = torch.randn(q.shape, device=flash_device, dtype=dtype)
    results = []
    ours, ref = flash_attn.flash_attention, flash_attn.attention_ref
    for function, cast in ((ours, dtype), (ref, dtype), (ref, torch.float64)):
        leaves = [x.detach().to(cast).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, causal=causal)
        results.append([x.double() for x in (out, *torch.autograd.grad(out, leaves, dout.to(cast)))])
    for ours, torchs, ref in zip(*results):
        assert (ours - ref).abs().max() <= 2 * (torchs - ref).abs().max() + 2 * torch.finfo(dtype).eps * ref.abs().max()


@needs_gpu
def test_flash_gpu_memory_is_linear():
    peaks = []
    for T in (4096, 8192):
        q, k, v = [x.requires_grad_() for x in flash_tensors(1, 8, 8, T, T, 64, torch.bfloat16)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        flash_attn.flash_attention(q, k, v).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]


# ======================================================== train.py: resumed and parallel runs equal one whole run

TRAIN_SMALL = dict(dataset="tiny", tokenizer="bpe", vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, batch_size=4,
                   max_iters=20, eval_interval=10, eval_tokens=400, log_interval=1, device="cpu", dtype="float32", workers=1)
TRAIN_ALONE = types.SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), autocast=torch.autocast("cpu", enabled=False))


@pytest.fixture(scope="module")
def train_dir(tmp_path_factory):
    """A folder with a small prepared dataset, data/tiny, made from real source files."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "notes").mkdir()
    for name in ("ast", "bisect", "heapq", "textwrap", "shlex", "queue", "sched", "stat", "copy", "fnmatch", "glob", "csv"):
        (folder / "notes" / f"{name}.txt").write_text(importlib.import_module(name).__doc__ * 3 + name * 200)
    train_prepare(folder)
    return folder


def train_prepare(folder, **kw):
    words = [sys.executable, os.path.join(HERE, "prepare.py"), *train_words(**kw)]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)


def train_words(**kw):
    return [f"--{k}={v}" for k, v in {**TRAIN_SMALL, "input": "notes", **kw}.items()]


def train_here(monkeypatch, train_dir, tmp_path, stop_at=None, **kw):
    """train.main in this process and train_dir, without samples; SIGTERM arrives in step stop_at. -> the last checkpoint."""
    monkeypatch.chdir(train_dir)
    monkeypatch.setattr(train, "show_sample", lambda *a: None)
    handlers, factor = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)], train.lr_factor
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                # more only slow down so small a model
    def lr_factor(step, cfg):
        if step + 1 == stop_at: signal.raise_signal(signal.SIGTERM)
        return factor(step, cfg)
    monkeypatch.setattr(train, "lr_factor", lr_factor)
    out = tmp_path / kw.pop("out", "run")
    try: train.main(config.load(train_words(out_dir=out, **kw)))
    finally:
        for handler in handlers: signal.signal(*handler)
        torch.set_num_threads(threads)
        monkeypatch.undo()
    return model_py.load_checkpoint(str(out / "ckpt.pt"))


def train_log(out):
    return [json.loads(line) for line in open(out / "log.jsonl")]


def equal_states(a, b):
    return all(torch.equal(x, y) for x, y in zip(a["model"].values(), b["model"].values(), strict=True))


def train_run(folder, *words, processes=1, wait=True, restarts=0, sampling=False):
    """Run train.py as one process, or as several under torchrun -> its output or, with wait=False, the process. The final sample,
    another process that takes as long as the run, is skipped unless sampling."""
    script = Path(HERE if sampling else folder) / ("train.py" if sampling else "train_only.py")
    if not sampling:
        script.write_text("import config, train\ntrain.show_sample = lambda *args: None\nconfig.run(train.main)\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    words = [sys.executable, *(torchrun if processes > 1 else ()), str(script), *words]
    job = subprocess.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    return job.communicate(timeout=170)[0] if wait else job


def block_of(batches, number):
    x, y = batches.read(batches.spans(number, 1))
    return np.append(x[0], y[0, -1])


def test_train_batches_visit_every_block_once_an_epoch_and_store_nothing(tmp_path):
    np.arange(1003, dtype="<u2").tofile(tmp_path / "a.bin")
    batches = train.Batches(tmp_path / "a.bin", 10, seed=3)
    orders = []
    for epoch in range(3):
        blocks = np.stack([block_of(batches, epoch * 100 + i) for i in range(100)])
        assert blocks.shape == (100, 11) and np.all((blocks[:, 1:] - blocks[:, :-1]) % 1003 == 1)     # wraps around
        assert len(set(blocks[:, :10].flatten())) == 1000
        orders.append(blocks[:, 0].tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) != sorted(orders[1])        # new order and offset each epoch
    again = train.Batches(tmp_path / "a.bin", 10, seed=3)
    assert block_of(again, 277).tolist() == [(orders[2][77] + j) % 1003 for j in range(11)]
    assert block_of(train.Batches(tmp_path / "a.bin", 10, seed=4), 5)[0] != orders[0][5]
    assert batches.epoch.cache_info().hits >= 297                       # drawn once an epoch, not once a row
    x, y = again.read(again.spans(3, 4))
    assert x.shape == y.shape == (4, 10) and np.array_equal(x[:, 1:], y[:, :-1])


def test_train_lr_factor():
    cfg = config.Config(max_iters=100, warmup_iters=9, decay_frac=0.5, min_lr_frac=0.2)
    for step, factor in ((0, 0.1), (4, 0.5), (9, 1), (30, 1), (50, 1), (75, 0.6), (99, 0.216), (100, 0.2)):
        assert train.lr_factor(step, cfg) == pytest.approx(factor)
    cfg = config.Config(max_iters=100, warmup_iters=0, decay_frac=1.0, lr_schedule="cosine", min_lr_frac=0.0)
    assert train.lr_factor(50, cfg) == pytest.approx(0.5)
    assert train.lr_factor(25, cfg) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("tokens", [0, 100, 37, 9999])
def test_train_evaluate_is_the_mean_over_fixed_windows(tmp_path, tokens):
    np.random.default_rng(0).integers(61, size=331).astype("<u2").tofile(tmp_path / "v.bin")
    model, cfg = tiny_gpt(dropout=0.5), config.Config(**{**vars(tiny()), "block_size": 32}, batch_size=3, eval_tokens=tokens)
    data = torch.from_numpy(np.fromfile(tmp_path / "v.bin", dtype="<u2").astype(np.int64))
    starts, losses, n = {0: range(0, 330, 32), 100: [0, 3 * 32, 7 * 32], 37: [0], 9999: range(0, 330, 32)}[tokens], [], 0
    for s in starts:                                                            # evenly spread, whole rows but for the last
        e = min(s + 32, 330)
        losses.append(torch.nn.functional.cross_entropy(model(data[None, s:e])[0][0], data[s + 1:e + 1], reduction="sum").item())
        n += e - s
    state = torch.get_rng_state()
    loss, _ = train.evaluate(model.train(), train.Batches(tmp_path / "v.bin", 32, 0), cfg, TRAIN_ALONE)
    assert loss == pytest.approx(sum(losses) / n, rel=1e-5)
    assert torch.equal(state, torch.get_rng_state()) and model.training         # no dropout inside, training mode after


@pytest.mark.parametrize("kw", [
    dict(), dict(optimizer="adamw", learning_rate=3e-3, dropout=0.2), dict(dtype="float16"),
    dict(dtype="bfloat16", tokens_per_step=256, batch_size=8, window_pattern="SL", window=6, doc_mask=True)])
def test_train_resume_is_bit_for_bit(monkeypatch, train_dir, tmp_path, kw):
    whole = train_here(monkeypatch, train_dir, tmp_path, out="whole", **kw)
    half = train_here(monkeypatch, train_dir, tmp_path, out="half", stop_at=10, **kw)
    assert half["step"] == 10 and not equal_states(whole, half)
    resumed = train_here(monkeypatch, train_dir, tmp_path, out="half", init_from="resume", **kw)
    assert resumed["step"] == 20 and equal_states(whole, resumed)
    a, b = ([(r["step"], r.get("loss"), r.get("val_loss")) for r in train_log(tmp_path / out)] for out in ("whole", "half"))
    assert a == b and resumed["best"] == whole["best"]                  # with the evaluation at step 10, where it stopped
    assert a[-1][2] < a[0][1] - 0.3                                     # and it learned something
    assert resumed["scaler"] == whole["scaler"] and whole["scaler"].get("_growth_tracker", 20) == 20      # float16 alone has one
    assert all(0.01 < r["norm"] < 100 for r in train_log(tmp_path / "whole") if "norm" in r)     # unscaled in float16 too


def test_train_checkpoint_is_plain_and_complete(monkeypatch, train_dir, tmp_path):
    real, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(real(model, backend="eager")) or compiled[0])
    checkpoint = train_here(monkeypatch, train_dir, tmp_path, max_iters=2, compile=True)
    assert compiled and not [k for k in checkpoint["model"] if "_orig_mod" in k or "module." in k]
    assert checkpoint["config"]["n_embd"] == 32 and isinstance(checkpoint["tokenizer"], dict)
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "best.pt", "ckpt.pt", "config.json", "log.jsonl"]
    assert json.load(open(tmp_path / "run" / "config.json"))["vocab_size"] == 300
    meta, step, val = checkpoint["meta"], *train_log(tmp_path / "run")[-2:]
    monkeypatch.setitem(train.PEAK_FLOPS, "cpu", 1e12)
    train_here(monkeypatch, train_dir, tmp_path, out="peak", max_iters=1)
    fast, flops = train_log(tmp_path / "peak")[0], model_py.GPT.from_checkpoint(checkpoint).estimate_flops()
    assert fast["mfu"] == pytest.approx(flops * fast["tok_per_s"] / 1e12)
    assert step["mfu"] is None and step["tokens"] == val["tokens"] == 2 * 64            # 64 a step; a CPU's peak is unknown
    assert val["val_bpb"] == pytest.approx(val["val_loss"] / math.log(2) * meta["tokens"]["val"] / meta["bytes"]["val"])
    rates = [group["lr"] for state in checkpoint["optimizers"] for group in state["param_groups"]]
    assert rates == pytest.approx([rate * step["lr_factor"] for rate in (0.05, 0.004, 0.01)]) and step["lr_factor"] < 1


def test_train_best_is_the_lowest_validation_loss_and_documents_are_kept_apart(monkeypatch, train_dir, tmp_path):
    losses, starts, ticks = iter((3.0, math.nan, 2.0, 2.5)), [], itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks) + 1000 * len(starts))        # as if an evaluation took 1000 s
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "evaluate", lambda model, *args: starts.append(
        (model.eot, model.grad_checkpoint)) or (next(losses), 0.0))
    last = train_here(monkeypatch, train_dir, tmp_path, max_iters=4, eval_interval=1, doc_mask=True, grad_checkpoint=True)
    best = model_py.load_checkpoint(str(tmp_path / "run" / "best.pt"))
    assert (best["step"], best["best"], last["step"], last["best"]) == (3, 2.0, 4, 2.0)
    assert starts == [(last["meta"]["eot"], True)] * 4 and train_log(tmp_path / "run")[-1]["seconds"] < 100    # without evaluations


def test_train_plan_warns_of_what_cannot_fit(monkeypatch):
    cfg, gpu = config.load(train_words()), dict(world=1, peak=1e12, device=torch.device("cuda"), name="a GPU")
    gpu |= dict(dtype=torch.float32, compile=True)
    for free, val, warning in ((2 ** 20, 100, "lower --batch_size"), (2 ** 40, 100, ""), (2 ** 40, 10 ** 6, "--eval_tokens=")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2 ** 40))
        lines = train.plan(cfg, model_py.GPT(cfg.model()), types.SimpleNamespace(**gpu), 64, 6400, val)
        assert warning in lines and lines.count("WARNING") == bool(warning)


def test_train_non_finite_steps_are_skipped_counted_and_end_the_run(monkeypatch, train_dir, tmp_path, capsys):
    real, weights = torch.nn.utils.clip_grad_norm_, {}
    def poisoned(bad, grad_clip=1.0):   # in the steps `bad`, counted from here, the gradient is NaN
        weights.clear()
        def clip(parameters, limit):
            parameters = list(parameters)
            assert limit == grad_clip
            weights[len(weights) + 1] = parameters[0].detach().clone()
            if len(weights) in bad: parameters[0].grad.fill_(math.nan)
            return real(parameters, limit)
        return clip
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned({3, 4, 6}))
    train_here(monkeypatch, train_dir, tmp_path, max_iters=7, max_bad_steps=3)  # never 3 in a row; train_here undoes the patch
    assert torch.equal(weights[3], weights[4]) and torch.equal(weights[4], weights[5]) and not torch.equal(weights[5], weights[6])
    assert capsys.readouterr().out.count("1 skipped, not finite") == 3
    assert [r["skipped"] for r in train_log(tmp_path / "run") if "loss" in r] == [0, 0, 1, 1, 0, 1, 0]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned({3, 4, 6}))     # the same steps, fewer log lines
    train_here(monkeypatch, train_dir, tmp_path, out="rare", max_iters=7, max_bad_steps=3, log_interval=5)
    each, rare = ([r for r in train_log(tmp_path / out) if "loss" in r] for out in ("run", "rare"))
    assert [(r["step"], r["skipped"]) for r in rare] == [(1, 0), (5, 2), (7, 1)] and rare[1]["norm"] == each[4]["norm"]
    assert rare[1]["loss"] == pytest.approx((each[1]["loss"] + each[4]["loss"]) / 2) and rare[2]["loss"] == each[6]["loss"]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned(set(range(4, 99)), math.inf))
    with pytest.raises(ValueError, match="7 steps in a row"):           # counted across log lines
        train_here(monkeypatch, train_dir, tmp_path, out="streak", max_bad_steps=6, log_interval=5, profile=99, grad_clip=0)
    assert json.load(open(tmp_path / "streak" / "trace.json"))["traceEvents"]       # the profiler must be stopped, or it crashes
    for every, message in ((2, "resume from .*ckpt.pt with"), (10, "no checkpoint is saved yet, start again")):
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned(set(range(3, 99))))
        with pytest.raises(ValueError, match=f"4 steps in a row had a non-finite gradient: {message}"):
            train_here(monkeypatch, train_dir, tmp_path, out=f"bad{every}", max_bad_steps=4, eval_interval=every)
        assert (tmp_path / f"bad{every}" / "ckpt.pt").exists() == (every == 2)
    real, losses = train.objective, itertools.count(1)                  # a loss that is not finite, with finite gradients
    poison = {2: math.inf, 3: math.nan, 5: -math.inf}
    monkeypatch.setattr(train, "objective", lambda *args: real(*args) + poison.get(next(losses), 0))
    train_here(monkeypatch, train_dir, tmp_path, out="loss", max_iters=6, eval_interval=99, batch_size=2)
    assert [r["skipped"] for r in train_log(tmp_path / "loss") if "loss" in r] == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_train_update_skips_exactly_and_is_otherwise_the_optimizers_own(optimizer):
    """After a bad step, the first or a later one, weights and optimizer state are as if update had not been called."""
    cfg, runs = config.Config(**vars(tiny(norm="layernorm", bias=True)), optimizer=optimizer, weight_decay=0.1), []
    for bad, own in ((set(), True), (set(), False), ({0, 2}, False)):
        model, clean = tiny_gpt(norm="layernorm", bias=True), 0
        optimizers = model.configure_optimizers(cfg)
        for step in range(5 if bad else 3):
            idx = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(clean))
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            if step in bad:
                for p in model.parameters(): p.grad.fill_(math.nan if step else math.inf)
            clean += step not in bad
            if own: [o.step() for o in optimizers]
            else: train.update(optimizers, ~torch.stack([p.grad.norm() for p in model.parameters()]).norm().isfinite())
            model.zero_grad()
        state = [t for o in optimizers for p in model.parameters() if p in o.state for t in o.state[p].values()]
        runs.append([*model.parameters(), *state])
    assert len(runs[0]) > 2 * len(list(model.parameters())) - 9
    for a, b, c in zip(*runs, strict=True): assert torch.equal(a, b) and torch.equal(a, c) and a.any()
    p = torch.ones(2, requires_grad=True)                               # an optimizer without found_inf, as on MPS
    for bad in (True, False):
        p.sum().backward()
        train.update([torch.optim.SGD([p], lr=1.0)], torch.tensor(bad))
        assert p.tolist() == [float(bad)] * 2
        p.grad = None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_train_update_never_waits_for_the_gpu():
    model, idx = tiny_gpt().cuda(), torch.randint(61, (2, 9), device="cuda")
    optimizers = model.configure_optimizers(config.Config(**vars(tiny())))
    for _ in range(2):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        torch.cuda.set_sync_debug_mode("error")
        try: train.update(optimizers, ~torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite())
        finally: torch.cuda.set_sync_debug_mode("default")


class Killed(BaseException): pass


def killed(monkeypatch, owner, name, call):
    """Make the call-th call of owner.name end the process: files stay as they are then, a checkpoint with a few bytes written."""
    real, calls = getattr(owner, name), itertools.count(1)
    def fatal(*args, **kw):
        if next(calls) < call: return real(*args, **kw)
        if name == "save": args[1].write(b"half a checkpoint")
        raise Killed
    monkeypatch.setattr(owner, name, fatal)


def test_train_killed_in_any_place_resumes_bit_for_bit(monkeypatch, train_dir, tmp_path):
    """In a step, in an evaluation, halfway through best.pt or ckpt.pt, before a rename, between the two files, in the log."""
    kw = dict(max_iters=9, eval_interval=3)
    whole = train_here(monkeypatch, train_dir, tmp_path, out="whole", **kw)
    places = [(torch.nn.utils, "clip_grad_norm_", 5), (train, "evaluate", 2), (torch, "save", 3), (torch, "save", 4),
              (os, "fsync", 6), (os, "replace", 5), (os, "replace", 6), (json, "dumps", 8),
              (torch, "save", 1), (train, "save_checkpoint", 2)]
    for i, (owner, name, call) in enumerate(places):
        killed(monkeypatch, owner, name, call)
        with pytest.raises(Killed): train_here(monkeypatch, train_dir, tmp_path, out=f"{i}", **kw)
        saved = (tmp_path / f"{i}" / "ckpt.pt").exists()
        assert saved == (i < 8)                                 # the last two die before there is a ckpt.pt
        resumed = train_here(monkeypatch, train_dir, tmp_path, out=f"{i}", **dict(init_from="resume") if saved else {}, **kw)
        assert equal_states(whole, resumed) and resumed["best"] == whole["best"]
        assert [r["step"] for r in train_log(tmp_path / f"{i}") if "loss" in r] == list(range(1, 10))


def test_train_sigterm_in_an_evaluation_saves_and_resumes(monkeypatch, train_dir, tmp_path, capsys):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: (signal.raise_signal(signal.SIGTERM), evaluate(*a))[1])
    stopped = train_here(monkeypatch, train_dir, tmp_path, eval_interval=5)
    out = capsys.readouterr().out
    assert out.count("stopped by a signal") == 1 and "give the same command with --init_from=resume" in out
    assert stopped["step"] == 6
    resumed = train_here(monkeypatch, train_dir, tmp_path, eval_interval=5, init_from="resume")
    assert equal_states(resumed, train_here(monkeypatch, train_dir, tmp_path, eval_interval=5, out="whole"))


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode: pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_train_full_or_read_only_disk_is_one_line_and_keeps_the_last_checkpoint(monkeypatch, train_dir, tmp_path, small_disk):
    kw = dict(eval_interval=2, max_iters=10)
    whole = train_here(monkeypatch, train_dir, tmp_path, out="whole", **kw)
    advice = "free space or choose another --out_dir"
    with pytest.raises(OSError, match=rf"cannot write .*\.pt \(.*{advice}; any earlier checkpoint is intact$"):
        train_here(monkeypatch, train_dir, small_disk, keep_checkpoints=9, **kw)
    kept = sorted((small_disk / "run").glob("ckpt_*.pt"))
    step = model_py.load_checkpoint(str(small_disk / "run" / "ckpt.pt"))["step"]
    assert 2 <= step < 10 and not list((small_disk / "run").glob("*.tmp")) and model_py.load_checkpoint(str(kept[-1]))
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left on device"): filler.write_bytes(bytes(1 << 22))
    with pytest.raises(OSError, match="No space left on device.*: free space or fix that path"):
        train_here(monkeypatch, train_dir, small_disk, init_from="resume", **kw)
    for path in (*kept, filler): path.unlink()
    assert equal_states(train_here(monkeypatch, train_dir, small_disk, init_from="resume", **kw), whole)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system: .*: free space or fix that path"):
        train_here(monkeypatch, train_dir, small_disk, out="new", **kw)


OOM = "^out of memory: halve --batch_size=4 and set --tokens_per_step=64"

@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory"), OOM), (RuntimeError("MPS backend out of memory"), OOM),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OOM), (RuntimeError("a bug"), "^a bug$")])
def test_train_out_of_memory_is_one_line(error, message, monkeypatch, train_dir, tmp_path):
    monkeypatch.setattr(model_py.GPT, "forward", raising(error))
    with pytest.raises(ValueError if message == OOM else RuntimeError, match=message): train_here(monkeypatch, train_dir, tmp_path)


@pytest.mark.parametrize("kw, world", [(dict(), 2), (dict(grad_checkpoint=True, dropout=0.1), 1)])
def test_train_on_mps_refuses_what_torch_cannot_do_there(monkeypatch, kw, world):
    """gloo has no MPS, and checkpointing does not restore its random numbers."""
    monkeypatch.setattr(train, "pick_device", lambda *args: torch.device("mps"))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match="^on MPS there is no torchrun, .*: add --device=cpu"): train.Machine(config.Config(**kw))


@pytest.mark.parametrize("kw, message", [
    (dict(tokens_per_step=100), "not a multiple of batch_size * block_size * 1 device(s) = 64: set --tokens_per_step=128"),
    (dict(block_size=9000, n_embd=2, n_head=1, n_layer=1), "tokens, block_size is 9000: give more text"),
    (dict(init_from="resume"), "no checkpoint at"), (dict(device="gpu"), "device='gpu' is not a device"),
    (dict(seed=2 ** 32, dropout=0.1), "seed=4294967296 must be below 2**32"),
    (dict(window=8), "window_pattern='' and window=8 belong together"),
    (dict(doc_mask=True, dataset="one", input="notes/heapq.txt", vocab_size=260), "one is a single document: leave out"),
    (dict(vocab_size=400), "data/tiny was prepared with vocab_size=300, not 400: run prepare.py")])
def test_train_errors(monkeypatch, train_dir, tmp_path, kw, message):
    with pytest.raises(ValueError) as e: train_here(monkeypatch, train_dir, tmp_path, **kw)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_train_resume_refuses_another_model_and_notes_other_knobs_and_text(monkeypatch, train_dir, tmp_path, capsys):
    train_here(monkeypatch, train_dir, tmp_path, max_iters=2)
    for kw, message in ((dict(), "go on with --init_from=resume"), (dict(init_from="resume", n_layer=3), "n_layer 2 -> 3"),
                        (dict(init_from="resume", optimizer="adamw"), "differs: optimizer 'muon' -> 'adamw'")):
        with pytest.raises(ValueError, match=message): train_here(monkeypatch, train_dir, tmp_path, **kw)
    path = tmp_path / "run" / "ckpt.pt"
    data = torch.load(path, weights_only=True)
    model_py.save_checkpoint(str(path), {**data, "meta": {**data["meta"], "tokenizer_hash": "other"}})
    with pytest.raises(ValueError, match="another tokenizer"): train_here(monkeypatch, train_dir, tmp_path, init_from="resume")
    model_py.save_checkpoint(str(path), {"model": {}, "model_args": {}, "iter_num": 5})     # like nanoGPT's
    with pytest.raises(ValueError, match="lacks asked, config"):
        train_here(monkeypatch, train_dir, tmp_path, init_from="resume")
    older = {key: {k: v for k, v in data[key].items() if k not in ("rope_trained", "bias")} for key in ("asked", "config")}
    model_py.save_checkpoint(str(path), data | older)                       # its knobs came later
    with pytest.raises(ValueError, match="differs: bias False -> True; give the run's config files"):
        train_here(monkeypatch, train_dir, tmp_path, init_from="resume", bias=True)
    with pytest.raises(ValueError, match="was prepared with tokenizer='bpe', not 'gpt2'"):
        train_here(monkeypatch, train_dir, tmp_path, init_from="resume", tokenizer="gpt2")
    train_here(monkeypatch, train_dir, tmp_path, init_from="resume", max_iters=3, seed=5)
    assert "max_iters 2 -> 3, seed 1337 -> 5" in capsys.readouterr().out
    changed = train_here(monkeypatch, train_dir, tmp_path, init_from="resume", max_iters=4, beta1=0.7, beta2=0.5,
                         weight_decay=0.25)
    groups = [group for state in changed["optimizers"] for group in state["param_groups"]]
    assert [*groups[0]["betas"]] == [0.7, 0.5] and groups[-1]["weight_decay"] == 0.25              # in effect
    train_here(monkeypatch, train_dir, tmp_path, init_from="resume", max_iters=5, dtype="float16")     # no scaler so far
    bins = dict(data["meta"]["sha256"], **{"train.bin": "another"})
    model_py.save_checkpoint(str(path), {**data, "meta": {**data["meta"], "sha256": bins}})
    assert not re.search("resuming on other text|is newer", capsys.readouterr().out)
    with open(tmp_path / "run" / "log.jsonl", "ab") as f:                   # as after a crash
        f.write(b'{"step": 1, "lo\n{"step": 1, "a": {"step": 2}\n\0\xff\n3\n{"step": 2, "lo')
    train_here(monkeypatch, train_dir, tmp_path, init_from="resume", max_iters=3)
    assert "resuming on other text" in capsys.readouterr().out
    train_here(monkeypatch, train_dir, tmp_path, init_from="resume", max_iters=2)
    assert "has its 3 steps already: to go on, raise --max_iters" in capsys.readouterr().out
    assert [r["step"] for r in train_log(tmp_path / "run") if "loss" in r] == [1, 2, 3]
    with monkeypatch.context() as m:
        rows, real = [], train.Batches.spans
        m.setattr(train.Batches, "spans", lambda self, first, count: rows.append((first, count)) or real(self, first, count))
        train_here(monkeypatch, train_dir, tmp_path, init_from="resume", max_iters=5, tokens_per_step=192)
        assert rows == [(3 * 64 // 16, 12), (3 * 64 // 16 + 12, 12)]            # goes on where larger steps had stopped reading
    assert {r["step"]: r["tokens"] for r in train_log(tmp_path / "run")} == {1: 64, 2: 128, 3: 192, 4: 384, 5: 576}
    last = model_py.load_checkpoint(str(path))
    model_py.save_checkpoint(str(path), last | dict(best=0.5))              # the best loss counts on the same text alone
    assert train_here(monkeypatch, train_dir, tmp_path, init_from="resume", max_iters=6)["best"] == 0.5
    assert train_here(monkeypatch, train_dir, tmp_path, init_from="resume", max_iters=7, eval_tokens=64)["best"] > 0.5
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged.*best.pt[^\n]*$"):
        train_here(monkeypatch, train_dir, tmp_path, init_from="resume")


@pytest.mark.parametrize("optimizer, shard, rel", [("adamw", False, 1e-4), ("muon", False, 2e-3), ("muon", True, 2e-3)])
def test_train_one_process_equals_two_ranks(monkeypatch, train_dir, tmp_path, optimizer, shard, rel):
    """
    4 micro-batches in 1 process and 2 in each of 2 gloo ranks give the same losses, norms and weights, up to the order of
    additions. Muon multiplies in bfloat16, which amplifies such differences at every step: hence its larger tolerance.
    """
    kw = dict(tokens_per_step=128, batch_size=2, max_iters=8, optimizer=optimizer, learning_rate=1e-3)
    one = train_here(monkeypatch, train_dir, tmp_path, out="one", **kw)
    out = train_run(train_dir, *train_words(out_dir=tmp_path / "two", shard_optimizer=shard, **kw), processes=2)
    two = model_py.load_checkpoint(str(tmp_path / "two" / "ckpt.pt"))
    assert "2 device(s)" in out and "Traceback" not in out and "saved" not in out
    train_same_log(tmp_path, rel)
    # Not every element: Adam divides by the gradient's size, so where the gradient is rounding noise, so is the step's sign
    for a, b in zip(one["model"].values(), two["model"].values(), strict=True):
        assert ((a - b).abs() > 5e-3).float().mean() < 2e-3


def train_same_log(folder, rel=2e-3):
    for a, b in zip(train_log(folder / "one"), train_log(folder / "two"), strict=True):
        keys = [k for k in ("loss", "norm", "val_loss") if k in a]
        assert [a[k] for k in keys] == pytest.approx([b[k] for k in keys], rel=rel, abs=1e-6)


def test_train_kill_and_sigterm_then_resume(monkeypatch, train_dir, tmp_path):
    """kill -9 loses only the steps since the last checkpoint; SIGTERM loses nothing."""
    kw = dict(max_iters=60, eval_interval=5)
    words, whole = train_words(**kw), train_here(monkeypatch, train_dir, tmp_path, out="whole", **kw)
    job = train_run(train_dir, *words, f"--out_dir={tmp_path}/killed", wait=False)
    for line in job.stdout:
        if line.startswith("step     23"): break
    job.kill()
    job.communicate()
    job = train_run(train_dir, *words, f"--out_dir={tmp_path}/killed", "--init_from=resume", wait=False)
    for line in job.stdout:
        if line.startswith("step     33"): break
    job.terminate()
    job.terminate()         # launchers repeat the signal
    rest = job.communicate(timeout=60)[0]
    assert "stopped by a signal" in rest and "--init_from=resume" in rest and job.returncode == 0
    resumed = train_here(monkeypatch, train_dir, tmp_path, out="killed", init_from="resume", **kw)
    assert resumed["step"] == 60 and equal_states(whole, resumed)
    assert [r["step"] for r in train_log(tmp_path / "killed") if "loss" in r] == list(range(1, 61))


@needs_fork
def test_train_rank_killed_under_torchrun_resumes_by_itself(train_dir, tmp_path):
    words = train_words(max_iters=25, eval_interval=5, batch_size=2, tokens_per_step=64, shard_optimizer=True)
    undisturbed = train_run(train_dir, *words, f"--out_dir={tmp_path}/whole", processes=2, wait=False)
    job = train_run(train_dir, *words, f"--out_dir={tmp_path}/killed", processes=2, restarts=1, wait=False)
    for line in job.stdout:
        if line.startswith("step     12"): break
    children = open(f"/proc/{job.pid}/task/{job.pid}/children").read().split()
    os.kill(int(children[-1]), 9)
    rest = job.communicate(timeout=120)[0]
    assert "resuming" in rest and "at step 10" in rest
    undisturbed.communicate(timeout=120)
    whole, killed = (model_py.load_checkpoint(f"{tmp_path}/{name}/ckpt.pt") for name in ("whole", "killed"))
    assert killed["step"] == 25 and equal_states(whole, killed)


def test_train_gradient_checkpointing_changes_nothing():
    idx, grads = torch.randint(61, (2, 17)), []
    for again in (False, True):
        model = tiny_gpt(dropout=0.1).train()
        model.grad_checkpoint = again
        torch.manual_seed(3)
        calls = []
        for block in model.transformer.h: block.register_forward_pre_hook(lambda *a: calls.append(a))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        assert len(calls) == 2 * (1 + again)                            # the backward pass runs both blocks again
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True): torch.testing.assert_close(a, b)


def test_train_two_runs_do_not_share_a_folder(monkeypatch, train_dir, tmp_path):
    os.makedirs(tmp_path / "run")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run" / ".lock")], stdin=-1, stdout=-1)
    other.stdout.readline()
    try:
        with pytest.raises(ValueError, match="belongs to a run that has not ended"):
            train_here(monkeypatch, train_dir, tmp_path, max_iters=1)
        assert os.listdir(tmp_path / "run") == [".lock"]
    finally: other.kill(), other.communicate()
    assert train_here(monkeypatch, train_dir, tmp_path, max_iters=1)["step"] == 1           # a dead run holds no lock


def test_train_keeps_traces_plans_and_names_what_is_missing(monkeypatch, train_dir, tmp_path, capsys):
    """keep_checkpoints, profile, wandb_log; an out_dir that is a file, wandb and torchrun where they are missing."""
    train_here(monkeypatch, train_dir, tmp_path, eval_interval=4, keep_checkpoints=2, profile=2)
    assert sorted(p for p in os.listdir(tmp_path / "run") if p.startswith("ckpt_")) == ["ckpt_000016.pt", "ckpt_000020.pt"]
    assert json.load(open(tmp_path / "run" / "trace.json"))["traceEvents"]
    os.makedirs(tmp_path / "[a]")
    for step in (999999, 1000000, "mine", "000003_mine"): (tmp_path / "[a]" / f"ckpt_{step}.pt").touch()   # from another branch
    train_here(monkeypatch, train_dir, tmp_path, out="[a]", max_iters=5, keep_checkpoints=1, profile=9)    # shorter than that
    kept = sorted(path.name for path in (tmp_path / "[a]").glob("ckpt_*.pt"))
    assert kept == ["ckpt_000003_mine.pt", "ckpt_000005.pt", "ckpt_mine.pt"]
    assert json.load(open(tmp_path / "[a]" / "trace.json"))["traceEvents"]
    (tmp_path / "file").touch()
    for out in ("file", "file/x"):
        with pytest.raises(OSError, match=f"'.*/{out}': free space or fix that path"):
            train_here(monkeypatch, train_dir, tmp_path, out=out)
    assert "tokens a parameter (Chinchilla" in capsys.readouterr().out
    seen, asked = [], []
    wandb_run = types.SimpleNamespace(log=lambda record, step: seen.append((step, "loss" in record)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kw: asked.append(kw) or wandb_run))
    train_here(monkeypatch, train_dir, tmp_path, out="wandb", wandb_log=True, wandb_project="p", max_iters=2)
    assert seen == [(1, True), (2, True), (2, False)] and (asked[0]["project"], asked[0]["name"]) == ("p", "wandb")
    if importlib.util.find_spec("wandb") is None:
        monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))        # the folder wandb/ of a former run
        with pytest.raises(ValueError, match="pip install wandb"):
            train_here(monkeypatch, train_dir, tmp_path, out="w", wandb_log=True)
    with pytest.raises(ValueError, match="start with torchrun"):
        train_here(monkeypatch, train_dir, tmp_path, out="z", shard_optimizer=True)


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12), ("Tesla P4", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA L40S", 362e12), ("NVIDIA B200", 2250e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA GH200 480GB", 989e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA A100-SXM4-80GB", 312e12)])
def test_train_peak_is_of_whole_words_of_the_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: name)         # put into the CPU's name
    assert train.Machine(config.Config(device="cpu")).peak == peak


def test_train_in_bfloat16_only_where_the_cpu_has_instructions_for_it(monkeypatch):
    for has, want in (({}, torch.float32), ({"avx512_bw": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16),
                      ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        assert train.Machine(config.Config(device="cpu")).dtype == want


def test_train_and_sample_without_a_compiler(monkeypatch, tmp_path):
    """torch.compile calls one: what was asked for by name is refused, what is only the default is left out."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not train.Machine(config.Config(device="cpu")).compile
    with pytest.raises(ValueError, match=r"--compile: torch.compile finds no C\+\+ compiler"):
        train.Machine(config.Config(device="cpu", compile=True))
    model, cfg = tiny_gpt(), config.Config(compile=True, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"--compile: torch.compile finds no C\+\+ compiler"):
        next(sample.decode(model, [sample.Row([1, 2], 0, None, cfg)], cfg, 61, Counter()))


def test_train_memory_estimate_counts_optimizer_state():
    """The estimate equals what the optimizers really hold after a step."""
    for optimizer, rank in (("muon", 0), ("adamw", 0), ("muon", 4)):
        cfg = config.load(train_words(optimizer=optimizer, lora_rank=rank, init_from="gpt2"))
        model = model_py.GPT(cfg.model())
        if rank: model.add_lora(rank)
        optimizers = model.configure_optimizers(cfg)
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
        for o in optimizers: o.step()
        state = [t for o in optimizers for state in o.state.values() for t in state.values()]
        held = sum(t.nbytes for t in state if torch.is_tensor(t) and t.dim())
        needed, trained = train.estimate_memory(cfg, model), [p for p in model.parameters() if p.requires_grad]
        assert held == needed["optimizer"] and sum(p.grad.nbytes for p in trained) == needed["gradients"]
        assert needed["weights"] == sum(p.nbytes for p in model.parameters())


TRAIN_TUNE = dict(answers=dict(lora_rank=4, dropout=0.1, learning_rate=1e-2),
                  pairs=dict(objective="dpo", optimizer="adamw", learning_rate=1e-3, batch_size=8),
                  lora_pairs=dict(objective="dpo", lora_rank=4, learning_rate=1e-2, batch_size=8))


@pytest.fixture(scope="module")
def tune_dir(train_dir):
    """train_dir with a Hugging Face folder to start from, prompts with answers, and preference pairs that prefer upper case."""
    pytest.importorskip("safetensors", reason="not installed: pip install safetensors")
    base = tiny_gpt(vocab_size=300, block_size=64, **CLASSIC)
    sample_checkpoint(train_dir / "base_run", base, json.load(open(train_dir / "data" / "tiny" / "tokenizer.json")))
    sample.main(config.load([f"--out_dir={train_dir / 'base_run'}", f"--export={train_dir / 'base'}"]))
    words = [w for w in re.findall(r"[a-z]{3,9}", " ".join(p.read_text() for p in (train_dir / "notes").iterdir()))][:120]
    lines = dict(answers=[{"prompt": w * (1 + i % 3), "response": w.upper() * (i % 4)}
                          for i, w in enumerate(dict.fromkeys(words))],
                 pairs=[{"prompt": w, "chosen": w.upper(), "rejected": w} for w in dict.fromkeys(words)])
    for name, items in lines.items():
        (train_dir / f"{name}.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
        train_prepare(train_dir, dataset=name, input=f"{name}.jsonl", init_from="base")
    return train_dir


def tune_knobs(kind, **kw):
    name = "answers" if kind == "answers" else "pairs"
    return dict(dataset=name, input=f"{name}.jsonl", block_size=32, eval_tokens=0, init_from="base") | TRAIN_TUNE[kind] | kw


def tune_here(monkeypatch, tune_dir, tmp_path, kind, **kw):
    return train_here(monkeypatch, tune_dir, tmp_path, **tune_knobs(kind, **kw))


@pytest.mark.parametrize("kind", TRAIN_TUNE)
def test_train_fine_tuning_resumes_bit_for_bit_and_samples_peer(monkeypatch, tune_dir, tmp_path, capsys, kind):
    real, modes = train.objective, []
    monkeypatch.setattr(train, "objective", lambda model, x, y, cfg, reference: modes.append(
        (model.training, reference and reference.training)) or real(model, x, y, cfg, reference))
    whole = tune_here(monkeypatch, tune_dir, tmp_path, kind, out="whole")
    assert modes[0] == ((False, None) if kind == "answers" else (True, False)) and modes[-1][0] is False    # dropout alone
    tune_here(monkeypatch, tune_dir, tmp_path, kind, out="half", stop_at=10)
    resumed = tune_here(monkeypatch, tune_dir, tmp_path, kind, out="half", init_from="resume")
    assert resumed["step"] == 20 and equal_states(whole, resumed) and (whole["reference"] is None) == (kind == "answers")
    log = [r["val_loss"] for r in train_log(tmp_path / "whole") if "val_loss" in r]
    before = [r["step"] for r in train_log(tmp_path / "whole")][0] == 0
    assert before == (kind == "answers")            # dpo's loss before training is log 2 whatever the data
    if kind == "answers":
        monkeypatch.chdir(tune_dir)
        val, cfg = train.Batches("data/answers/val.bin", 32, 0), config.Config(batch_size=4)
        assert log[0] == pytest.approx(train.evaluate(model_py.GPT.load("base"), val, cfg, TRAIN_ALONE)[0], rel=1e-4)
    else: assert train_log(tmp_path / "whole")[-1]["val_right"] > 0.5
    assert log[-1] < log[0] and log[-1:] == [r["val_loss"] for r in train_log(tmp_path / "half") if "val_loss" in r][-1:]
    if kind != "answers":
        losses = [r["loss"] for r in train_log(tmp_path / "whole") if "loss" in r]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
        monkeypatch.chdir(tune_dir)
        policy, start = model_py.GPT.from_checkpoint(whole), model_py.GPT.load("base")
        assert not policy.training and not start.training
        def gain(name):         # (n, 2): log-probability gained since the start by the chosen and the rejected answers
            pairs = train.Batches(f"data/pairs/{name}.bin", 32, 0, whole["meta"]["eot"])
            x, y = pairs.read(pairs.windows(0))
            return (policy(x, y, by_row=True)[1] - start(x, y, by_row=True)[1]).view(-1, 2)
        chosen, rejected = gain("train").T
        assert (chosen > rejected).float().mean() > 0.9
        assert log[-1] == pytest.approx(torch.nn.functional.softplus(0.1 * gain("val").diff(dim=1)).mean().item(), rel=1e-4)
    if kind == "answers":
        with monkeypatch.context() as m, pytest.raises(ValueError, match="no target counts in eval_tokens=1 of val.bin"):
            m.setattr(train.Batches, "windows", lambda self, tokens: np.array([[0, 2]]))       # within the first question
            tune_here(monkeypatch, tune_dir, tmp_path, kind, out="one", eval_tokens=1)
        assert not (tmp_path / "one").exists()                  # refused before the first step
    other = dict(objective="tokens", dataset="tiny", input="notes") if kind == "pairs" else {}
    with pytest.raises(ValueError, match="checkpoint differs: (lora_rank|objective)"):
        tune_here(monkeypatch, tune_dir, tmp_path, kind, **dict(out="half", init_from="resume", lora_rank=2) | other)
    assert "WARNING: Muon" not in capsys.readouterr().out               # neither with adamw nor with LoRA
    sample.main(config.load([f"--out_dir={tmp_path / 'whole'}", "--start=User:", "--max_new_tokens=5"]))       # with LoRA merged
    assert capsys.readouterr().out.startswith("User:")


def test_train_fine_tuning_at_a_longer_context_peer(monkeypatch, tune_dir, tmp_path, capsys):
    base = tiny_gpt(vocab_size=300, block_size=16)
    sample_checkpoint(tmp_path / "short", base, json.load(open(tune_dir / "data" / "tiny" / "tokenizer.json")))
    sample.main(config.load([f"--out_dir={tmp_path / 'short'}", f"--export={tmp_path / 'folder'}"]))
    knobs = dict(init_from=tmp_path / "folder", rope_scaling="yarn", rope_factor=4.0, block_size=48, max_iters=2, eval_tokens=0)
    last = train_here(monkeypatch, tune_dir, tmp_path, **knobs, tokenizer=tmp_path / "folder" / "tokenizer.json", dataset="longer")
    shape = last["config"]
    assert (shape["block_size"], shape["rope_scaling"], shape["rope_factor"], shape["rope_trained"]) == (48, "yarn", 4.0, 16)
    assert "WARNING: Muon's rates are for new weights" in capsys.readouterr().out
    assert model_py.load_checkpoint(str(tmp_path / "run" / "best.pt"))["step"] in (0, 1, 2)


@pytest.mark.parametrize("kind", ["answers", "lora_pairs"])
def test_train_fine_tuning_one_process_equals_two_ranks_peer(monkeypatch, tune_dir, tmp_path, kind):
    """Micro-batches and ranks are weighted by their numbers of answer tokens, so that they add up to one large batch."""
    kw = dict(tokens_per_step=256, batch_size=2, max_iters=4, dropout=0.0)
    tune_here(monkeypatch, tune_dir, tmp_path, kind, out="one", **{**kw, "batch_size": 8})
    out = train_run(tune_dir, *train_words(**tune_knobs(kind, out_dir=tmp_path / "two", **kw)), processes=2)
    assert "2 device(s)" in out and "Traceback" not in out
    train_same_log(tmp_path)


def test_train_masked_batches_and_evaluation_peer(tune_dir, monkeypatch):
    monkeypatch.chdir(tune_dir)
    batches = train.Batches("data/answers/train.bin", 32, 0)
    ids, mask, seen = np.fromfile("data/answers/train.bin", "<u2"), np.fromfile("data/answers/train.mask", np.uint8), []
    for i, (start, stop) in enumerate(batches.epoch(0)):
        rows, at = batches.read(batches.spans(i, 1)), np.arange(start + 1, stop) % len(ids)
        assert rows[1, 0].tolist() == [int(t) if m else -1 for t, m in zip(ids[at], mask[at])]
        assert batches.weigh(rows) == mask[at].sum()
        seen += at.tolist()
    assert len(set(seen)) == len(seen) == 32 * batches.n
    spans, ranks = batches.spans(0, 12), [types.SimpleNamespace(rank=i, world=2, device=TRAIN_ALONE.device) for i in (0, 1)]
    one, *two = (list(batches.share(spans, 2, r)) for r in (TRAIN_ALONE, *ranks))
    assert sum(weight for *_, weight in one) == batches.weigh(batches.read(spans)) and len({weight for *_, weight in one}) > 2
    for (x, y, weight), (x2, y2, weight2) in zip(one, itertools.chain(*zip(*two)), strict=True):    # ranks take turns
        assert torch.equal(x, x2) and torch.equal(y, y2) and weight == weight2
    model = tiny_gpt(vocab_size=300)
    cfg = config.Config(**{**vars(tiny(vocab_size=300)), "block_size": 32}, batch_size=3)
    total, n, data = 0.0, 0, torch.from_numpy(ids.astype(np.int64))
    for s in range(0, len(ids) - 1, 32):
        logp = model(data[None, s:min(s + 32, len(ids) - 1)])[0][0].log_softmax(-1)
        for j, row in enumerate(logp):
            if mask[s + j + 1]: total, n = total - row[data[s + j + 1]].item(), n + 1
    assert train.evaluate(model, batches, cfg, TRAIN_ALONE)[0] == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_train_dpo_equals_a_reference_written_out_in_float64_peer(tune_dir, monkeypatch, lora):
    """Loss and every gradient against the paper's formula, token by token, with separate models and unpadded texts."""
    monkeypatch.chdir(tune_dir)
    eot, beta = json.load(open("data/pairs/meta.json"))["eot"], 0.3
    pairs = train.Batches("data/pairs/train.bin", 64, 7, eot)
    model, cfg = tiny_gpt(vocab_size=300, block_size=64).double(), config.Config(objective="dpo", dpo_beta=beta)
    start = tiny_gpt(vocab_size=300, block_size=64).double()
    if lora:
        model.add_lora(4)
        model.double()
        for p in model.parameters():
            if p.requires_grad: torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(len(p)))
    else:
        with torch.no_grad():
            for p in model.parameters(): p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    policy = copy.deepcopy(model)
    ids, mask, total = np.fromfile("data/pairs/train.bin", "<u2"), np.fromfile("data/pairs/train.mask", np.uint8), 0.0
    def log_prob(m, a, b):
        text, logp = torch.from_numpy(ids[a:b].astype(np.int64)), 0.0
        for i, row in enumerate(m(text[None, :-1])[0][0]):
            if mask[a + i + 1]: logp = logp + (row - row.exp().sum().log())[text[i + 1]]
        return logp
    for i in range(4):
        (a, b), (c, d) = pairs.epoch(0)[2 * i:2 * i + 2]
        assert b == c and d - c <= 65 and ids[b - 1] == ids[d - 1] == eot
        with torch.no_grad(): ref = log_prob(start, a, b) - log_prob(start, c, d)
        total = total - torch.log(1 / (1 + torch.exp(-beta * (log_prob(policy, a, b) - log_prob(policy, c, d) - ref)))) / 4
    total.backward()
    x, y = pairs.read(pairs.spans(0, 8))
    losses = train.objective(model, x, y, cfg, start)
    loss = losses.mean()
    loss.backward()
    margins = -torch.log(torch.exp(losses) - 1)         # the loss of each pair is log(1 + exp(-beta * margin))
    pairs.windows = lambda tokens: pairs.spans(0, 8)
    found = train.evaluate(model, pairs, cfg, TRAIN_ALONE, start)
    assert found == pytest.approx([loss.item(), (margins > 0).double().mean().item()])
    assert loss.item() == pytest.approx(total.item(), rel=1e-6) and loss.item() != pytest.approx(math.log(2), abs=1e-3)
    compared = 0
    for p, q in zip(model.parameters(), policy.parameters()):
        if lora and not p.requires_grad: assert p.grad is None
        else:                                                   # tolerance: the loss computes its softmax in float32
            assert (p.grad - q.grad).abs().max() < 1e-6 * max(q.grad.abs().max(), 0.01)
            compared += q.grad.abs().max() > 0.01
    assert compared > 10


def test_train_pairs_visit_every_pair_once_and_cut_long_prompts(tmp_path):
    docs = [[i] * n + [9] for i, n in enumerate((3, 2, 30, 4, 1, 1))]
    np.concatenate(docs).astype("<u2").tofile(tmp_path / "a.bin")
    np.concatenate([[0] * (len(d) - 2) + [1, 1] for d in docs]).astype(np.uint8).tofile(tmp_path / "a.mask")
    pairs = train.Batches(tmp_path / "a.bin", 8, 0, 9)
    for epoch in range(3):
        x, y = pairs.read(pairs.spans(6 * epoch, 6))
        firsts = x[:, 0].tolist()
        assert sorted(firsts) == list(range(6)) and all(a % 2 == 0 and b == a + 1 for a, b in zip(firsts[::2], firsts[1::2]))
        assert (y[:, :] >= 0).sum(1).tolist() == [1 + (len(docs[f]) > 2) for f in firsts] and all(9 in row for row in y.tolist())
    assert x[firsts.index(2)].tolist() == [2] * 8 and pairs.windows(0)[2].tolist() == [7 + 31 - 9, 7 + 31]


def test_train_objective_and_data_must_fit_peer(monkeypatch, tune_dir, tmp_path):
    for kw, message in ((dict(dataset="pairs", input="pairs.jsonl", init_from="base"), "set --objective=dpo"),
                        (dict(objective="dpo"), "has no preference pairs"), (dict(lora_rank=4), "adapts a trained model")):
        with pytest.raises(ValueError, match=message): train_here(monkeypatch, tune_dir, tmp_path, **kw)
    with pytest.raises(ValueError, match="batch_size=3 must be even"): config.Config(objective="dpo", batch_size=3)


def test_train_prepares_missing_data_under_torchrun_and_ends_with_a_sample(train_dir, tmp_path):
    shutil.copytree(train_dir / "notes", tmp_path / "notes")
    out = train_run(tmp_path, *train_words(max_iters=2, batch_size=2, tokens_per_step=64), processes=2, sampling=True)
    assert out.count("preparing it first") == 1 and "more: python sample.py --out_dir=out/tiny " in out and "Traceback" not in out
    assert (tmp_path / "out" / "tiny" / "ckpt.pt").exists()


def test_train_goes_on_when_its_reader_is_gone(train_dir, tmp_path):
    """As behind `| head -1` or a `| tee` that has ended: every step, every sample, exit code 0."""
    words = [os.path.join(HERE, "train.py"), *train_words(out_dir=tmp_path / "a 'b", max_iters=3, sample_interval=1)]
    process = subprocess.Popen([sys.executable, *words], cwd=train_dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait() == 0, process.stderr.read()
    assert [r["step"] for r in train_log(tmp_path / "a 'b") if "loss" in r] == [1, 2, 3]


def test_train_warns_of_a_learning_rate_that_no_parameter_has(monkeypatch, train_dir, tmp_path, capsys):
    for knobs, warns in ((dict(), 0), (dict(learning_rate=0.01), 1), (dict(learning_rate=0.01, norm_gain=True), 0),
                         (dict(learning_rate=0.01, optimizer="adamw"), 0)):
        train_here(monkeypatch, train_dir, tmp_path, out=f"{knobs}", max_iters=1, **knobs)
        assert capsys.readouterr().out.count("WARNING: learning_rate is not used") == warns, knobs


def test_train_leaves_signals_as_they_were_runs_in_a_thread_and_shows_samples(monkeypatch, train_dir, tmp_path):
    monkeypatch.chdir(train_dir)
    monkeypatch.setattr(train, "show_sample", lambda *a: shown.append(a))
    numbers, shown = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), []
    before = [*map(signal.getsignal, numbers)]
    def run(name, **kw): train.main(config.load(train_words(**dict(out_dir=tmp_path / name, max_iters=2) | kw)))
    run("here", eval_interval=1, sample_interval=1, max_iters=3)
    assert [*map(signal.getsignal, numbers)] == before and [a[2] for a in shown] == [config.Config.start] * 3     # steps 1, 2, the end
    thread = threading.Thread(target=run, args=["there"])
    thread.start()
    thread.join()
    assert (tmp_path / "there" / "best.pt").exists()
    monkeypatch.setattr(train, "evaluate", lambda *a: (signal.raise_signal(signal.SIGHUP), (math.nan, 0.0))[1])    # ssh drops
    run("hup", max_iters=4, eval_interval=1)
    assert model_py.load_checkpoint(str(tmp_path / "hup" / "ckpt.pt"))["step"] == 2
    assert train_log(tmp_path / "hup")[1]["val_loss"] is None           # JSON has no NaN
    signal.signal(signal.SIGHUP, signal.SIG_IGN)                        # as nohup does
    try: run("nohup", max_iters=3, eval_interval=1)
    finally: signal.signal(signal.SIGHUP, before[2])
    assert model_py.load_checkpoint(str(tmp_path / "nohup" / "ckpt.pt"))["step"] == 3


def test_train_restarted_by_torchrun_resumes_only_its_own_run(monkeypatch, train_dir, tmp_path):
    train_here(monkeypatch, train_dir, tmp_path, max_iters=2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with monkeypatch.context() as m:
        m.setattr(os, "getppid", lambda: -1)            # another torchrun
        with pytest.raises(ValueError, match="exists: go on with --init_from=resume"):
            train_here(m, train_dir, tmp_path, max_iters=3)
    assert train_here(monkeypatch, train_dir, tmp_path, max_iters=3)["step"] == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")               # train_here undoes it
    os.unlink(tmp_path / "run" / "ckpt.pt")                             # ended before its first checkpoint: start again
    assert train_here(monkeypatch, train_dir, tmp_path, max_iters=1)["step"] == 1


def test_train_uses_changed_input_but_not_when_it_resumes(monkeypatch, train_dir, tmp_path, capsys):
    shutil.copytree(train_dir / "notes", tmp_path / "notes")
    first = train_here(monkeypatch, tmp_path, tmp_path, max_iters=2)
    data, meta = tmp_path / "data" / "tiny", lambda: json.loads((tmp_path / "data" / "tiny" / "meta.json").read_text())
    files, made = meta()["documents"], os.path.getmtime(data / "meta.json")
    (tmp_path / "notes" / "new.txt").write_text("a new file " * 300)
    os.utime(tmp_path / "notes" / "new.txt", (made + 5, made + 5))
    train_here(monkeypatch, tmp_path, tmp_path, max_iters=3, init_from="resume")
    assert "notes is newer than data/tiny: run prepare.py" in capsys.readouterr().out and meta()["documents"] == files
    train_here(monkeypatch, tmp_path, tmp_path, max_iters=2, out="again")
    assert sum(meta()["documents"].values()) == sum(files.values()) + 1 and "preparing again" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("something else " * 300)
    with pytest.raises(ValueError, match="was prepared with input='notes', not 'other'"):       # and is not overwritten
        train_here(monkeypatch, tmp_path, tmp_path, max_iters=2, out="other", input="other")
    shutil.rmtree(tmp_path / "notes")               # the dataset alone suffices
    assert train_here(monkeypatch, tmp_path, tmp_path, max_iters=2, out="last")["step"] == first["step"]


def test_train_divides_by_the_targets_that_a_mask_of_ones_own_counts(monkeypatch, train_dir, tmp_path):
    shutil.copytree(train_dir / "data", tmp_path / "data")
    losses = []
    for mask in (None, np.arange(10 ** 6, dtype=np.uint8) % 4 == 0):
        for split in ("train", "val") if mask is not None else ():
            mask[:os.path.getsize(tmp_path / "data" / "tiny" / f"{split}.bin") // 2].tofile(tmp_path / f"data/tiny/{split}.mask")
        train_here(monkeypatch, tmp_path, tmp_path, max_iters=1, out=f"run{len(losses)}", input="")
        losses.append(train_log(tmp_path / f"run{len(losses)}")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)          # of an untrained model: not a quarter


def test_train_what_goes_wrong_on_one_rank_ends_the_others_in_silence():
    ranks = (types.SimpleNamespace(rank=i, local_rank=i, any=lambda error: True) for i in (0, 1))     # any: some rank failed
    with pytest.raises(ValueError, match="no data"): train.Machine.in_turn(next(ranks), raising(ValueError("no data")))
    with pytest.raises(SystemExit) as e: train.Machine.in_turn(next(ranks), raising(ValueError("no data")))
    assert e.value.code == 1


# ======================================================== sample.py: every row recomputed alone, without a cache

sample_TOK = bpe.Tokenizer.train(["the cat sat on the mat, the rat sat on the cat. déjà vu — 🙂🙂 ok\n" * 20], 280)
sample_CPU = torch.device("cpu")


def sample_gpt(seed=0, noise=0.3, **kw):
    """A small random model, noisy enough that an error in the cache changes its argmax."""
    torch.manual_seed(seed)
    shape = dict(block_size=64, vocab_size=320, n_layer=2, n_head=4, n_kv_head=2, n_embd=32) | kw
    model = model_py.GPT(config.GPTConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * noise)
    return model.requires_grad_(False)


def sample_rows(model, prompts, seeds=None, ends=(), stops=(), limit=280, static=False, stats=None, cache=None, **kw):
    cfg = config.Config(**{**dict(max_new_tokens=20, temperature=1.0, top_k=0, compile=static), **kw})
    rows = [sample.Row(p, s, sample_TOK, cfg, ends, stops) for p, s in zip(prompts, seeds or range(len(prompts)))]
    for _ in sample.decode(model, rows, cfg, limit, Counter() if stats is None else stats, cache): pass
    return rows


def sample_checkpoint(folder, model=None, tokenizer=None, **kw):
    model = model or sample_gpt(**kw)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "ckpt.pt")
    model_py.save_checkpoint(path, dict(model=model.state_dict(), config=dataclasses.asdict(model.config),
                                        tokenizer=sample_TOK.to_dict() if tokenizer is None else tokenizer))
    return path


SAMPLE_PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [44, 45, 46], [5]]
SAMPLE_SHAPES = [dict(), dict(pos="learned", norm="layernorm", mlp="gelu", bias=True, qk_norm=False, n_kv_head=4),
                 dict(pos="sinusoidal", n_kv_head=1), dict(n_layer=3, window_pattern="SL", window=6)]


def sample_recomputed(model, prompt, seed, n, **kw):
    """One row generated as nanoGPT does, with the whole text through the model for each token, from the same uniform numbers."""
    cfg, ids = config.Config(**{**dict(temperature=1.0, top_k=0), **kw}), list(prompt)
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    for i in range(n): ids.append(sample.draw(model(torch.tensor([ids]))[0][:, -1, :280], u[i:i + 1], cfg).item())
    return ids[len(prompt):]


@pytest.mark.parametrize("shape", SAMPLE_SHAPES)
@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_sample_ragged_batch_equals_each_row_recomputed(shape, chunk):
    model = sample_gpt(**shape)
    for row in sample_rows(model, SAMPLE_PROMPTS, prefill_chunk=chunk, top_p=0.95):
        assert row.tokens == sample_recomputed(model, row.prompt, row.seed, 20, top_p=0.95)


def test_sample_prefill_then_a_step_gives_the_uncached_logits_of_every_row():
    model, prompts = sample_gpt(), SAMPLE_PROMPTS[:3]
    for chunk in (1, 2, 3, 7, 64):
        cfg = config.Config(prefill_chunk=chunk)
        rows, stats = [sample.Row(p, 0, sample_TOK, cfg) for p in prompts], Counter()
        cache = sample.prefill(model, rows, cfg, stats)
        assert cache.lengths.tolist() == [0, 8, 2] and stats["prompt_tokens"] == 10
        logits = model(torch.tensor([p[-1:] for p in prompts]), cache=cache)[0][:, 0]
        for row, p in zip(logits, prompts):
            torch.testing.assert_close(row, model(torch.tensor([p]))[0][0, -1], atol=1e-4, rtol=1e-4)


def test_sample_rows_that_end_leave_the_batch_and_disturb_nobody():
    model, fed = sample_gpt(), []
    plain = sample_rows(model, SAMPLE_PROMPTS)
    end = plain[1].tokens[4]
    hidden = model.hidden
    model.hidden = lambda idx, cache=None: (fed.append(idx.shape), hidden(idx, cache))[1]
    rows = sample_rows(model, SAMPLE_PROMPTS, ends={end})
    assert fed[0][0] == 3 and fed[-1][0] < 4, "equal prompts are read once, and finished rows cost nothing"
    for a, b in zip(plain, rows):
        n = a.tokens.index(end) + 1 if end in a.tokens else 20
        assert b.tokens == a.tokens[:n] and b.finish == ("end" if end in a.tokens else "length")


def test_sample_logprobs_are_those_of_the_model_itself():
    model = sample_gpt()
    for row in sample_rows(model, SAMPLE_PROMPTS, temperature=0.5, top_k=5):
        logp = model(torch.tensor([row.prompt + row.tokens]))[0][0, :, :280].log_softmax(-1)
        expected = [logp[len(row.prompt) - 1 + i, t].item() for i, t in enumerate(row.tokens)]
        assert row.logprobs == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kw", [dict(top_k=0), dict(top_k=5), dict(top_p=0.8, top_k=9), dict(min_p=0.2, top_k=0),
                                dict(temperature=2.0, top_k=0)])
def test_sample_draws_follow_the_filtered_softmax(kw):
    cfg, N, V = config.Config(**{**dict(temperature=0.9), **kw}), 40000, 12
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 2
    u = torch.rand(N, generator=torch.Generator().manual_seed(2))
    counts = torch.bincount(sample.draw(logits.expand(N, V), u, cfg), minlength=V).double()
    p = model_py.filter_logits(logits[None].double(), cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p).softmax(-1)[0]
    assert (counts[p == 0] == 0).all() and (p > 0).sum() > 1
    chi2, free = ((counts - N * p).square() / (N * p))[p > 0].sum().item(), (p > 0).sum().item() - 1
    assert chi2 < free + 5 * math.sqrt(2 * free) + 5
    wrong = p.roll(1)                               # this test can fail
    assert ((counts - N * wrong).square() / (N * wrong + 1e-9)).sum() > 100


@pytest.mark.parametrize("speculate", [0, 3])
def test_sample_seeds_in_a_row_follow_the_filtered_softmax_of_the_model(speculate):
    """The joint distribution of two tokens over consecutive seeds, generated through the cache, without and with drafts."""
    V, N, kw = 5, 3000, dict(temperature=1.3, top_k=4, top_p=0.93)
    model, prompt = sample_gpt(vocab_size=V, noise=0.1), [0, 1, 2, 0, 1]        # drafts 2, then 0, as after the first 0, 1
    rows = sample_rows(model, [prompt] * N, limit=V, max_new_tokens=2, speculate=speculate, **kw)
    def exact(*ids):
        logits = model(torch.tensor([[*prompt, *ids]]))[0][:, -1].double()
        return model_py.filter_logits(logits, *kw.values()).softmax(-1)[0]
    expected = N * torch.stack([exact()[t] * exact(t) for t in range(V)])
    counts = torch.bincount(torch.tensor([r.tokens[0] * V + r.tokens[1] for r in rows]), minlength=V * V).view(V, V)
    chi2 = lambda e: ((counts - e).square() / e.clamp(min=1e-9))[e > 0].sum().item()
    cells = (expected > 0).sum().item()
    assert (counts[expected == 0] == 0).all() and V < cells < V * V
    assert chi2(expected) < cells + 5 * math.sqrt(2 * cells) and chi2(expected.T) > 400       # this test can fail


def test_sample_draw_edges_never_pick_what_is_filtered():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    cfg = config.Config(temperature=1.0, top_k=0)
    for u, want in ((0.0, 1), (1 - 2 ** -24, 3)): assert sample.draw(logits, torch.tensor([u]), cfg).item() == want
    assert sample.draw(logits, None, config.Config(temperature=0)).item() == 3


def test_sample_repetition_penalty_against_plain_python_and_with_drafts():
    logits = torch.tensor([[[2.0, -2.0, 1.0]], [[2.0, -2.0, 1.0]]])
    seen = torch.tensor([[True, True, False], [False, False, True]])
    assert sample.penalise(logits, seen, 2.0).tolist() == [[[1.0, -4.0, 1.0]], [[2.0, -2.0, 0.5]]]
    model, prompt, ids = sample_gpt(), [5, 6, 5], [5, 6, 5]
    for _ in range(20):
        l = model(torch.tensor([ids]))[0][0, -1, :280]
        for t in set(ids): l[t] = l[t] / 1.5 if l[t] > 0 else l[t] * 1.5
        ids.append(l.argmax().item())
    for speculate in (0, 4):
        assert sample_rows(model, [prompt, [1]], temperature=0, repetition_penalty=1.5, speculate=speculate)[0].tokens == ids[3:]
    plain, fond = (sample_rows(model, [prompt], temperature=0, repetition_penalty=p)[0].tokens for p in (1.0, 0.5))
    assert plain != ids[3:] and plain != fond
    kw = dict(repetition_penalty=1.3, temperature=0.9, ends=set(range(0, 280, 9)), max_new_tokens=30)
    together = sample_rows(model, SAMPLE_PROMPTS, **kw)
    assert len({len(r.tokens) for r in together}) > 1                       # rows end at different times
    for r in together: assert sample_rows(model, [r.prompt], [r.seed], **kw)[0].tokens == r.tokens


@pytest.mark.parametrize("shape", SAMPLE_SHAPES[:2])
def test_sample_speculation_changes_nothing_and_saves_passes(shape):
    model, prompts = sample_gpt(noise=0.15, **shape), [[7, 8, 9, 7, 8, 9, 7, 8], [3], [1, 2, 1, 2, 1, 2, 1]]
    past_the_context = dict(max_new_tokens=90, temperature=0.5)
    for kw in (dict(temperature=0), dict(temperature=0.7, top_p=0.9), past_the_context):
        plain, fast = Counter(), Counter()
        a = sample_rows(model, prompts, stats=plain, **{**dict(max_new_tokens=50), **kw})
        b = sample_rows(model, prompts, stats=fast, speculate=5, **{**dict(max_new_tokens=50), **kw})
        assert [r.tokens for r in a] == [r.tokens for r in b] and [r.finish for r in a] == [r.finish for r in b]
        for x, y in zip(a, b): assert x.logprobs == pytest.approx(y.logprobs, abs=1e-3)
        if kw == dict(temperature=0): assert fast["steps"] < plain["steps"]


def test_sample_drafts_are_what_followed_the_latest_same_ending():
    row = sample.Row([2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 0, sample_TOK, config.Config())
    assert row.draft(2) == [5, 1] and row.draft(0) == []
    for t in (7, 2, 3): row.add(t, 0.0)
    assert row.draft(9) == [7, 2, 3]
    row.add(100, 0.0)
    assert row.draft(3) == [] and sample.Row([1], 0, sample_TOK, config.Config()).draft(3) == []


def test_sample_stop_strings_match_over_token_boundaries_and_are_held_back():
    cfg = config.Config(max_new_tokens=50)
    for text, stops, want in (("the cat sat on", [b"t s"], "the ca"), ("abcabd!", [b"abd"], "abc"), ("aab", [b"ab", b"aab"], ""),
                              ("déjà vu", ["à".encode()], "déj"), ("x\n\ny", [b"\n\n"], "x")):
        for ids in (sample_TOK.encode(text), list(text.encode())):          # merged tokens; single bytes
            row, seen = sample.Row([1], 0, sample_TOK, cfg, (), stops), ""
            for t in ids:
                if row.finish: break
                row.add(t, 0.0)
                assert row.text.startswith(seen), "what was shown is never taken back"
                seen = row.text
                assert want.startswith(row.text), "nothing of a stop string is ever shown"
            assert (row.text, row.finish) == (want, "stop")
    row = sample.Row([1], 0, sample_TOK, dataclasses.replace(cfg, max_new_tokens=3), (), [b"zzz"])
    for t in b"azz": row.add(t, 0.0)
    assert (row.text, row.finish) == ("azz", "length")                      # zz was held back, then shown
    row = sample.Row([1], 0, sample_TOK, dataclasses.replace(cfg, max_new_tokens=2), {98})
    for t in b"ab": row.add(t, 0.0)
    assert (row.text, row.finish) == ("a", "end")                           # an end token is no text, even the last allowed
    rng = random.Random(0)
    for _ in range(300):            # random bytes, checked against the text so far; a row may hold back only its end
        stops = ["".join(rng.choices("abé🙂", k=rng.randint(1, 3))).encode() for _ in range(rng.randint(0, 2))]
        raw = b"".join(rng.choices([b"a", b"b", "é".encode(), "🙂".encode(), b"\xff", b"\xf0\x9f"], k=40))[:40]
        row = sample.Row([1, 2], 0, sample_TOK, dataclasses.replace(cfg, max_new_tokens=len(raw)), (), stops)
        for n, byte in enumerate(raw, 1):
            row.add(byte, 0.0)
            assert len(row.held) < max(map(len, stops), default=0) + 4
            if row.finish: break
        found = [raw[:n].find(stop) for stop in stops if stop in raw[:n]]
        assert row.text == raw[:min(found, default=n)].decode("utf-8", "replace") and (row.finish == "stop") == bool(found)
        assert row.ids == [1, 2, *raw[:n]] and row.tokens == list(raw[:n])


def test_sample_streams_whole_characters_only():
    row, shown = sample.Row([1], 0, sample_TOK, config.Config()), []
    for t in "é🙂—ok".encode():
        row.add(t, 0.0)
        shown.append(row.text)
    assert "�" not in "".join(shown) and shown[:6] == ["", "é", "é", "é", "é", "é🙂"]
    row = sample.Row([1], 0, sample_TOK, config.Config(max_new_tokens=2))
    for t in "🙂".encode()[:2]: row.add(t, 0.0)
    assert row.text == "�" and row.finish == "length"                       # ends inside a character


def test_sample_reads_stops():
    eot = sample_TOK.special_tokens["<|endoftext|>"]
    for text, want in (("", ({eot}, [])), ("a\\tb", ({eot}, [b"a\tb"])),
                       ("a|<|endoftext|>|b c", ({eot}, [b"a", b"b c"])), ("\\n\\n", ({eot}, [b"\n\n"]))):
        assert sample.read_stops(config.Config(stop=text), sample_TOK) == want
    for text in ("a||b", "|a", "a|"):
        with pytest.raises(ValueError, match="empty part"): sample.read_stops(config.Config(stop=text), sample_TOK)
    with pytest.raises(ValueError, match=re.escape("<|no|>")): sample.read_stops(config.Config(stop="<|no|>"), sample_TOK)


def sample_beams(model, prompt, cfg, V, ends=(), stops=()):
    for found in sample.decode(model, [sample.Row(prompt, 0, sample_TOK, cfg, ends, stops)], cfg, V, Counter()): pass
    return found


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_sample_beam_search_equals_exhaustive_search(penalty):
    V, L, end = 4, 4, 2
    for seed in range(3):
        model = sample_gpt(seed=seed, vocab_size=V)
        every = []
        for n in range(1, L + 1):
            seqs = [[*seq] for seq in itertools.product(range(V), repeat=n) if end not in seq[:-1] and (n == L or seq[-1] == end)]
            logp = model(torch.tensor([[1, 0] + seq for seq in seqs]))[0][:, 1:-1].double().log_softmax(-1)
            logp = logp.gather(2, torch.tensor(seqs)[:, :, None]).sum((1, 2)) / n ** penalty
            every += zip(logp.tolist(), seqs)
        every.sort(reverse=True)
        cfg = config.Config(num_beams=V ** L, temperature=0, max_new_tokens=L, length_penalty=penalty)
        found = sample_beams(model, [1, 0], cfg, V, {end})
        assert [r.tokens for r in found][:20] == [s for _, s in every][:20]
        assert found[0].score(penalty) == pytest.approx(every[0][0], abs=1e-4)
        narrow = dataclasses.replace(cfg, num_beams=1)
        greedy = sample_beams(model, [1, 0], narrow, V)[0].tokens
        assert greedy == sample_recomputed(model, [1, 0], 0, L, temperature=0)


def sample_naive_beams(model, prompt, n, V, ends, L, penalty):
    """Beam search that recomputes every step from the whole text and never stops early."""
    live, done = [(0.0, [])], []
    while live:
        logp = model(torch.tensor([prompt + seq for _, seq in live]))[0][:, -1, :V].log_softmax(-1).tolist()
        grown, live = [(total + p[t], seq + [t]) for (total, seq), p in zip(live, logp) for t in range(V)], []
        for rank, (total, seq) in enumerate(sorted(grown, reverse=True)):
            if rank >= 2 * n and (len(live) == n or len(seq) == L): break
            if seq[-1] in ends or len(seq) == L: done.append((total / len(seq) ** penalty, seq))
            elif len(live) < n: live.append((total, seq))
    return [seq for _, seq in sorted(done, reverse=True)[:n]]


def test_sample_narrow_beams_equal_a_naive_search_that_never_stops_early():
    lengths = set()
    for seed, n, penalty in itertools.product(range(6), (2, 3), (0.0, 1.0, 2.0)):
        model, V, L = sample_gpt(seed=seed, vocab_size=6, noise=0.2), 6, 9
        cfg = config.Config(num_beams=n, temperature=0, max_new_tokens=L, length_penalty=penalty)
        found = sample_beams(model, [1, 0], cfg, V, {2})
        want = sample_naive_beams(model, [1, 0], n, V, {2}, L, penalty)
        assert found[0].tokens == want[0] and [r.tokens for r in found] == want
        lengths.add(len(want[0]))
        found = sample_beams(model, [1, 0], cfg, V, {2}, [b"\3", b"\4", b"\5"])        # tokens 3, 4, 5 end a beam, too
        assert [r.tokens for r in found] == sample_naive_beams(model, [1, 0], n, V, {2, 3, 4, 5}, L, penalty)
    assert len(lengths) > 2
    for logits, go_on in (([3.0, 2.5, 2.0, 1.0, 0.5, 0.0], 2), ([60.0, 59.0, 0.0, 0.0, 0.0, 0.0], 0)):
        cfg = config.Config(num_beams=2, temperature=0, max_new_tokens=20)
        beam = sample.Row([1], 0, sample_TOK, cfg, {0, 1, 2})               # three ends come first; none can overtake two ends
        assert len(sample.branch([beam], torch.tensor([logits]), [], cfg)) == go_on


def test_sample_beam_search_passes_the_context():
    cfg = config.Config(num_beams=3, temperature=0, max_new_tokens=90)
    assert [len(r.tokens) for r in sample_beams(sample_gpt(vocab_size=280), [3, 4], cfg, 280)] == [90] * 3


def test_sample_window_equals_a_slow_twin():
    """Past its context, the rolling cache equals a fresh pass over the tokens it keeps, with positions counted from 0 again."""
    for shape, drop in ((dict(n_layer=1), 30 // 8), (dict(n_layer=1, rope_scaling="yarn", rope_factor=2.0), 30 // 8),
                        (dict(pos="learned"), 32 // 2)):        # RoPE: one layer, whose keys depend only on their own tokens
        model = sample_gpt(block_size=32, **shape)
        for row in sample_rows(model, [[1, 2, 3], list(range(20))], max_new_tokens=60, temperature=0, sinks=2):
            kept = list(row.prompt)
            for t in row.tokens:
                assert model(torch.tensor([kept]))[0][0, -1, :280].argmax().item() == t
                if len(kept) == 32: kept = kept[:2] + kept[2 + drop:]
                kept.append(t)


def test_sample_rows_past_the_context_do_not_depend_on_neighbours():
    for pos in ("rope", "learned"):
        model = sample_gpt(pos=pos, block_size=24)
        together = sample_rows(model, SAMPLE_PROMPTS, max_new_tokens=50, temperature=0.7)
        for i, row in enumerate(together):
            assert sample_rows(model, [row.prompt], [row.seed], max_new_tokens=50, temperature=0.7)[0].tokens == row.tokens


def test_sample_static_shapes_give_the_same_text(monkeypatch):
    shapes = set()          # the path of compiled steps, without compiling
    monkeypatch.setattr(torch, "compile", lambda f, **kw: lambda cache, *x: shapes.add(x[1].shape) or f(cache, *x))
    model = sample_gpt(window_pattern="SL", window=6)
    sample_rows(model, [[7, 8, 9, 7, 8]], static=True, max_new_tokens=12, speculate=3)
    assert shapes == {(1, 4)}       # up to the last token: each new shape would be compiled
    sample_rows(model, [[7, 8, 9, 7, 8]], static=True, max_new_tokens=150, speculate=3)
    assert shapes == {(1, 4), (1, 1)}       # past the context of 64: no draft where a whole one does not fit
    for speculate in (0, 3):
        for prompts in (SAMPLE_PROMPTS, SAMPLE_PROMPTS[1:2]):
            kw = dict(max_new_tokens=80, speculate=speculate, ends={7, 8, 9})
            a, b = sample_rows(model, prompts, **kw), sample_rows(model, prompts, static=True, **kw)
            assert [r.tokens for r in a] == [r.tokens for r in b]


def test_sample_shapes_stay_where_steps_are_compiled_but_not_for_beams(monkeypatch):
    recorded, record = [], sample.record
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    monkeypatch.setattr(sample, "record", lambda *args: recorded.append(1) or record(*args))
    for kw, want in ((dict(compile=True), 1), (dict(), 0), (dict(compile=True, num_beams=2, temperature=0), 0)):
        cfg = config.Config(max_new_tokens=5, top_k=0, **kw)
        for _ in sample.decode(sample_gpt(), [sample.Row([7, 8], 0, sample_TOK, cfg)], cfg, 280, Counter()): pass
        assert len(recorded) == want, kw
        recorded.clear()


def test_sample_times_of_decoding_leave_compiling_out(monkeypatch):
    clock, record = itertools.count(), sample.record
    def slow(*args): return [next(clock) for _ in range(10000)] and record(*args)
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    monkeypatch.setattr(sample, "record", slow)
    monkeypatch.setattr(sample, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    stats = Counter()
    rows = sample_rows(sample_gpt(), SAMPLE_PROMPTS, static=True, stats=stats, ends={7, 8, 9})
    assert stats["steps"] <= stats["seconds"] < 10000 and stats["tokens"] == sum(len(row.tokens) for row in rows)


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU. Recording notes every operation, but does not execute writes to memory that existed before;
    replay() executes all of them on the same tensors. Decisions of the host are made once, in the recording."""
    def __init__(self):
        super().__init__()
        self.calls, self.mine = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, memory = kwargs or {}, lambda t: t.untyped_storage()._cdata
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        assert not {"lift_fresh", "_local_scalar_dense"} & {func._opname}, f"{func}: host and device must not meet"
        writes = func._schema.is_mutable
        out = args[0] if writes and memory(args[0]) not in self.mine else func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and memory(t) not in map(memory, tensors): self.mine.add(memory(t))
        self.calls.append((func, args, kwargs, out, writes))
        return out

    def replay(self):
        for func, args, kwargs, out, writes in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(*map(tree_leaves, (out, again))) if not writes else ():
                if isinstance(old, torch.Tensor): old.copy_(new)


def test_sample_recorded_steps_give_the_same_text(monkeypatch):
    recordings, caches, align = [], [], sample.align
    monkeypatch.setattr(sample, "align", lambda model, cache, *args: caches.append(cache) or align(model, cache, *args))
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recordings.append(Tape()) or recordings[-1])
    # Unlike a real recording, the tape computes: reset the lengths so that the cache has room for it
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: caches[-1].lengths.zero_() is None or tape)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())
    for shape in (dict(window_pattern="SL", window=6), dict(pos="learned")):
        model = sample_gpt(**shape)
        for kw in (dict(), dict(speculate=3), dict(repetition_penalty=1.3, top_k=50), dict(temperature=0, speculate=2)):
            kw = dict(max_new_tokens=80, ends={7, 8, 9}) | kw           # past the context; rows end at different times
            a = sample_rows(model, SAMPLE_PROMPTS, **kw)
            recordings.clear()
            b = sample_rows(model, SAMPLE_PROMPTS, static=True, **kw)
            assert [r.tokens for r in a] == [r.tokens for r in b] and 0 < len(recordings) < 8
            for x, y in zip(a, b): assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


@needs_gpu
@pytest.mark.parametrize("kw", [dict(), dict(speculate=3), dict(repetition_penalty=1.3), dict(compile=False)])
def test_sample_gpu_recorded_steps_give_the_same_text(kw):
    torch.set_float32_matmul_precision("highest")       # an earlier test of train.py set TF32, which changes tokens
    model = sample_gpt(n_embd=64).cuda()
    kw = dict(max_new_tokens=80, temperature=0, ends={7, 8, 9}) | kw
    b = sample_rows(model, SAMPLE_PROMPTS, static=True, **kw)
    a = [sample_rows(model, [row.prompt], [row.seed], cache=sample.new_cache(model, 1, 64), **kw)[0] for row in b]  # not recorded
    for x, y in zip(a, b): assert x.tokens == y.tokens and x.logprobs == pytest.approx(y.logprobs, abs=1e-2)


def test_sample_rope_scaling_against_the_papers_formulas():
    base = dict(n_embd=32, n_head=2, block_size=256)
    for kind in ("linear", "ntk", "yarn", "llama3"):
        c = config.GPTConfig(**base, rope_scaling=kind, rope_factor=4.0)
        for d in range(8):
            freq, s, trained = 10000 ** (-2 * d / 16), 4.0, 64
            turns = trained * freq / (2 * math.pi)
            want = {"linear": freq / s, "ntk": (10000 * s ** (16 / 14)) ** (-2 * d / 16)}.get(kind)
            if want is None:
                high = 32 if kind == "yarn" else 4
                blend = min(max((turns - 1) / (high - 1), 0), 1)
                want = (1 - blend) * freq / s + blend * freq
            cos, sin = model_py.position_table(c)
            scale = 0.1 * math.log(4) + 1 if kind == "yarn" else 1.0
            for t in (0, 1, 100, 255):
                assert cos[t, d].item() == pytest.approx(scale * math.cos(t * want), abs=1e-5) and \
                    sin[t, d].item() == pytest.approx(scale * math.sin(t * want), abs=1e-5)
    for bad in (dict(rope_scaling="ntk"), dict(rope_factor=2.0), dict(rope_scaling="ntk", rope_factor=2.0, pos="learned")):
        with pytest.raises(ValueError, match="belong together"): config.GPTConfig(**base, **bad)


def test_sample_int8_is_within_half_a_step_and_keeps_the_loss(monkeypatch):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(96, 40), torch.randn(7, 96)
    q = sample.Int8Linear(linear)
    bound = (q.scale.float() / 2)[None] * x.abs().sum(-1, keepdim=True)     # each weight is at most half a step off
    assert ((q(x) - linear(x)).abs() <= bound + 1e-5).all() and q.weight.dtype == torch.int8
    exact = torch.nn.functional.linear(x, q.weight.float() * q.scale.float()[:, None], linear.bias)
    torch.testing.assert_close(q(x), exact, atol=1e-4, rtol=1e-4)
    for rows, width in itertools.product((1, 3, 4, 5), (96, 40, 24)):       # packed kernel; plain product
        narrow = torch.nn.Linear(width, 40)                                 # torch's kernel fails at 40 and 24
        y = sample.Int8Linear(narrow)(x[:rows, :width].bfloat16()).float()
        torch.testing.assert_close(y, narrow(x[:rows, :width]), atol=0.1, rtol=0.02)
    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "is_cuda", True, raising=False)             # scales in float32, as on a GPU
        torch.testing.assert_close(q(x.bfloat16()).float(), exact, atol=0.05, rtol=0.02)
    text = torch.tensor(sample_TOK.encode("the cat sat on the mat, the rat sat on the cat. " * 40))
    model = model_py.GPT(config.GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=64))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for i in range(60):
        at = torch.randint(len(text) - 33, (8,))
        b = torch.stack([text[j:j + 33] for j in at])
        b = torch.where(torch.rand(b.shape) < 0.2, torch.randint(280, b.shape), b)      # noise: the loss must stay above 0
        model(b[:, :-1], b[:, 1:])[1].backward()
        opt.step()
        opt.zero_grad()
    def loss(m):
        logits = m(test[:, :-1])[0]
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), test[:, 1:].flatten()).item()
    test = text[:33 * 8].view(8, 33)
    test = torch.where(torch.rand(test.shape) < 0.2, torch.randint(280, test.shape), test)
    before = loss(model)
    for dtype in (torch.float32, torch.bfloat16):
        again = model_py.GPT(model.config)
        again.load_state_dict(model.state_dict())
        again = sample.place(again, sample_CPU, dtype, int8=True)
        assert abs(loss(again) / before - 1) < 0.005 and sum(isinstance(m, sample.Int8Linear) for m in again.modules()) == 13
        for part in (test[:, :32], test[:1, :1], test[:1, :4]):             # few rows: another bfloat16 kernel
            exact = model(part)[0]
            assert (again(part)[0].float() - exact).abs().max() < (0.05 if dtype == torch.float32 else 0.1) * exact.abs().max()


def test_sample_packed_weights_give_the_same_logits():
    for shape in SAMPLE_SHAPES:
        model, x = sample_gpt(**shape), torch.randint(280, (3, 11))
        want = model(x)[0]
        torch.testing.assert_close(sample.place(model, sample_CPU, torch.float32, pack=True)(x)[0], want, atol=1e-4, rtol=1e-4)
        model = sample.place(sample_gpt(**shape), sample_CPU, torch.bfloat16, pack=True)
        assert model(x)[0].dtype == torch.bfloat16 and (model(x)[0].float() - want).abs().max() < 0.15 * want.abs().max()
        if shape.get("pos") != "learned": assert model.table.dtype == torch.float32
    for bias, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        linear, x = torch.nn.Linear(5, 7, bias=bias, dtype=dtype), torch.randn(3, 1, 5).to(dtype)
        want, linear.__class__ = linear(x), sample.SplitLinear              # what compiled steps use; one row is a sum on a CPU
        torch.testing.assert_close(linear(x), want)
        def one_row(x): return linear(x)
        torch.testing.assert_close(torch.compile(one_row, backend="eager", fullgraph=True)(x[:1]), want[:1], atol=0.01, rtol=1e-2)


def test_sample_in_bfloat16_on_a_cpu_that_has_no_avx512():
    """oneDNN packs no bfloat16 there: the weights stay as they are. In a process of its own, where oneDNN is told of no AVX-512."""
    code = """
import torch, config, model, sample
gpt = model.GPT(config.GPTConfig(n_layer=1, n_head=2, n_embd=64, vocab_size=300, block_size=16))
gpt = sample.place(gpt, torch.device("cpu"), torch.bfloat16, pack=True)
assert gpt(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()
print(sum(isinstance(m, sample.PackedLinear) for m in gpt.modules()), torch.ops.mkldnn._is_mkldnn_bf16_supported())"""
    for isa in ("AVX2", "DEFAULT"):
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
                              capture_output=True, text=True)
        assert done.stdout.split() in (["0", "False"], ["7", "True"]), done.stderr


def test_sample_decoding_allocates_no_more_than_its_texts_need(monkeypatch):
    """Grouped queries need n_head / n_kv_head times less; prompts have at most 9 tokens, the context is 64."""
    caches, new_cache = [], sample.new_cache
    monkeypatch.setattr(sample, "new_cache", lambda *args: caches.append(new_cache(*args)) or caches[-1])
    for kv, new in ((4, 20), (1, 20), (1, 90)):
        sample_rows(sample_gpt(n_kv_head=kv), SAMPLE_PROMPTS, max_new_tokens=new)
        cache = caches.pop()
        held = sum(t.nbytes for t in cache.k + cache.v)
        assert not caches and held == 2 * 2 * len(cache.lengths) * kv * min(9 + new, 64) * 8 * 4
    model, stats = sample_gpt(n_kv_head=1), Counter()
    sample_rows(model, [[5]], stats=stats)                              # 20 steps read all weights, and 1, 2, .. 20 positions
    weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert stats["bytes"] == 20 * weights + 2 * 2 * 8 * 4 * sum(range(1, 21))


def test_sample_only_ids_of_the_tokenizer_are_drawn():
    model = sample_gpt()
    with torch.no_grad(): model.lm_head.weight[250:] *= 0
    model.lm_head.weight[280:] += 5 * model.lm_head.weight[:1]            # make padding of the vocabulary the likeliest
    assert all(t < 260 for r in sample_rows(model, SAMPLE_PROMPTS, limit=260, max_new_tokens=40) for t in r.tokens)


def sample_main(capsys, *argv):
    sample.main(config.load([*argv]))
    return capsys.readouterr().out


def sample_json(capsys, *argv):
    return [json.loads(line) for line in sample_main(capsys, *argv).splitlines()]


def test_sample_prompts_file_gives_json_lines_that_a_seed_reproduces(tmp_path, capsys):
    out, texts = [f"--out_dir={tmp_path}", "--max_new_tokens=12"], ("the cat", "on the mat, the", "vu")
    sample_checkpoint(tmp_path)
    (tmp_path / "p.txt").write_text("".join(text + "\n" for text in texts))
    args = [*out, "--seed=7", f"--prompts={tmp_path}/p.txt", "--num_samples=2", "--logprobs"]
    lines = sample_json(capsys, *args)
    expected = [(text, j, 7 + 2 * i + j) for i, text in enumerate(texts) for j in range(2)]
    assert [(l["prompt"], l["sample"], l["seed"]) for l in lines] == expected
    for l in lines:
        assert len(l["token_logprobs"]) == l["tokens"] and l["logprob"] == pytest.approx(sum(p for _, p in l["token_logprobs"]))
        alone = sample_main(capsys, *out, f"--seed={l['seed']}", f"--start={l['prompt']}")
        assert alone == l["prompt"] + l["text"] + "\n"
    assert [l["text"] for l in sample_json(capsys, *args, "--batch_size=1")] == [l["text"] for l in lines]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(dict(prompt=text + "\n\nvu", sample=1)) + "\n" for text in texts))
    lines = sample_json(capsys, *args[:-3], f"--prompts={tmp_path}/p.jsonl")
    assert [l["prompt"] for l in lines] == [text + "\n\nvu" for text in texts]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match='p.jsonl, line 2: want {"prompt": "..."}'):
        sample.main(config.load([*out, f"--prompts={tmp_path}/p.jsonl"]))


def test_sample_json_lines_are_not_lost_when_a_later_batch_is_interrupted(tmp_path, capsys, monkeypatch):
    sample_checkpoint(tmp_path)
    (tmp_path / "p.txt").write_bytes("the cat\r\nv\ru\r\non the mat\r\n".encode())        # line ends as on Windows
    argv = [f"--out_dir={tmp_path}", f"--prompts={tmp_path}/p.txt", "--max_new_tokens=5"]
    decode, calls = sample.decode, itertools.count(1)
    whole = sample_json(capsys, *argv)
    assert [line["prompt"] for line in whole] == ["the cat", "v\ru", "on the mat"]
    def interrupted(*args, **kw):
        if next(calls) == 3: raise KeyboardInterrupt
        return decode(*args, **kw)
    for more in (["--batch_size=1"], ["--num_beams=2", "--temperature=0"], ["--batch_size=2", "--best_of=2"]):
        monkeypatch.setattr(sample, "decode", interrupted)
        calls = itertools.count(1)
        with pytest.raises(KeyboardInterrupt): sample.main(config.load([*argv, *more]))
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        monkeypatch.setattr(sample, "decode", decode)
        assert lines == sample_json(capsys, *argv, *more)[:2] and len(lines) == 2


def test_sample_best_of_and_beams_from_the_command_line(tmp_path, capsys):
    out, texts = [f"--out_dir={tmp_path}", "--max_new_tokens=12"], ("the cat", "on the mat, the", "vu")
    sample_checkpoint(tmp_path)
    best = sample_json(capsys, *out, "--start=the cat", "--best_of=6", "--num_samples=2", "--logprobs", "--stop=a")
    every = sample_json(capsys, *out, "--start=the cat", "--num_samples=6", "--logprobs", "--stop=a")
    assert [b["text"] for b in best] == [e["text"] for e in sorted(every, key=lambda e: -e["logprob"] / e["tokens"])[:2]]
    (tmp_path / "p.txt").write_text("".join(text + "\n" for text in texts))
    kw = dict(num_beams=3, temperature=0, num_samples=2, repetition_penalty=1.2, max_new_tokens=12)
    beams = sample_json(capsys, *out, f"--prompts={tmp_path}/p.txt", *(f"--{k}={v}" for k, v in kw.items()))
    model, tok, _ = sample.load(config.Config(out_dir=str(tmp_path)))
    found = [sample_beams(model, tok.encode(text), config.Config(**kw), tok.vocab_size, set(tok.first)) for text in texts]
    assert [(l["prompt"], l["text"]) for l in beams] == [(text, row.text) for text, rows in zip(texts, found) for row in rows[:2]]


def test_sample_newest_run_start_file_and_streaming(here, monkeypatch, capsys):
    with pytest.raises(ValueError, match="check --out_dir, or"): sample.main(config.load([]))
    old, new = sample_checkpoint("out/old"), sample_checkpoint("out/new", seed=1)
    os.utime(old, (1, 1))
    assert sample.find_checkpoint(config.Config()) == new and sample.find_checkpoint(config.Config(out_dir="out/old")) == old
    os.utime(new, (0, 0))
    assert sample.find_checkpoint(config.Config()) == old
    shutil.copy(old, "out/old/best.pt")
    assert sample.find_checkpoint(config.Config()) == os.path.join("out", "old", "best.pt")
    (here / "x.txt").write_text("the cat")
    args = ["--num_samples=3", "--max_new_tokens=8", "--start=the cat"]
    text = sample_main(capsys, *args, "--start=FILE:x.txt")
    assert text == sample_main(capsys, *args) and text.count("---------------") == 2
    lines = sample_json(capsys, *args, "--logprobs")
    assert text == "\n---------------\n".join("the cat" + line["text"] for line in lines) + "\n"
    shown = []                                      # what is printed, piece by piece
    with monkeypatch.context() as m:
        write = lambda text, end="\n", file=None, flush=False: file or shown.append(text + end)
        m.setattr(sample, "print", write, raising=False)
        sample.main(config.load([*args, "--batch_size=1"]))
    assert "".join(shown) == text and len(shown) > 20
    empty = sample_main(capsys, "--max_new_tokens=8", "--temperature=0")
    model = sample.load(config.Config())[0]
    eot = sample_TOK.special_tokens["<|endoftext|>"]
    row, = sample_rows(model, [[eot]], limit=sample_TOK.vocab_size, ends={eot}, temperature=0, max_new_tokens=8)
    assert empty == row.text + "\n"


def test_sample_of_the_smallest_contexts_and_of_a_file(tmp_path, capsys):
    """Contexts too short for the default number of sinks get fewer."""
    for size in (2, 3, 8, 9):
        path = sample_checkpoint(tmp_path, block_size=size)
        out = sample_json(capsys, f"--out_dir={path}", "--logprobs", "--max_new_tokens=20", "--temperature=1")
        assert out[0]["tokens"] == 20 or out[0]["finish"] == "end"


def test_sample_begins_with_what_training_has_seen(tmp_path, monkeypatch):
    """In a dataset of a single text nothing ever follows an end-of-text token, so its model starts from a newline instead."""
    eot, path = sample_TOK.special_tokens["<|endoftext|>"], sample_checkpoint(tmp_path)
    for documents, first in ((1, sample_TOK.encode("\n")), (2, [eot]), (None, [eot])):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["meta"] = {} if documents is None else dict(documents=dict(train=documents, val=1))
        model_py.save_checkpoint(path, checkpoint)
        tok = sample.load(config.Config(out_dir=str(tmp_path)))[1]
        assert sample.read_prompts(config.Config(), tok, 64) == ([first], [""])
        assert sample.read_prompts(config.Config(start="<|endoftext|>a"), tok, 64)[0] == [[eot, *tok.encode("a")]]
    sample_checkpoint(tmp_path, tokenizer=Tokenizer([], special_tokens=()).to_dict())      # no end-of-text token
    assert sample.load(config.Config(out_dir=str(tmp_path)))[1].first == [10]
    monkeypatch.setattr(bpe.Tokenizer, "gpt2", classmethod(lambda cls: copy.copy(sample_TOK)))
    sample_checkpoint(tmp_path, tokenizer="gpt2")                           # the stock encoding, by its name
    assert sample.load(config.Config(out_dir=str(tmp_path)))[1].hash == sample_TOK.hash


@pytest.mark.parametrize("argv, message", [
    (["--start=FILE:missing.txt"], "missing.txt"), (["--start=FILE:empty.txt"], "is empty"),
    (["--start=FILE:latin.txt"], "not UTF-8"), (["--prompts=empty.txt"], "is empty at line 1"),
    (["--prompts=gap.txt"], "is empty at line 2"), (["--prompts=end.txt"], "is empty at line 2"),
    (["--start=" + "xyz " * 40], "block_size is 64: shorten it"),
    (["--past_context=error", "--max_new_tokens=64"], "ask for at most 63"), (["--stop=<|foo|>"], "special tokens: ["),
    (["--stop=a||b"], "empty part"),
    (["--visualize=none/a.html"], "in a folder that exists"),
    (["--num_beams=2", "--temperature=0", "--interactive"], "leave out num_beams"), (["--visualize=out"], "cannot be written"),
    (["--interactive", "--prompts=gap.txt", "--compile", "--logprobs"], "leave out prompts, logprobs, compile"),
    (["--export=x", "--quantize=int8"], "leave out --quantize"), (["--init_from=out/good"], "has no tokenizer.json"),
    (["--out_dir=small"], "its tokenizer has 280 tokens, but its model only 100"),
    (["--out_dir=nowhere"], "no checkpoint in nowhere"), (["--out_dir=nameless"], "no tokenizer"), (["--out_dir=cut"], "damaged"),
    (["--device=cuda:77"], "CUDA devices"), (["--device=abacus"], "not a device"), (["--device=meta"], "--device=auto")])
def test_sample_bad_input_is_one_clear_line(argv, message, here):
    path = sample_checkpoint("out/good")
    sample_checkpoint("nameless", tokenizer="")
    sample_checkpoint("small", vocab_size=100)
    os.mkdir("cut")
    (here / "cut" / "ckpt.pt").write_bytes((here / path).read_bytes()[:5000])
    for name, data in (("empty.txt", b""), ("gap.txt", b"a\n\nb\n"), ("end.txt", b"a\n\n"), ("latin.txt", b"caf\xe9 ol\xe9")):
        (here / name).write_bytes(data)
    with pytest.raises((ValueError, OSError)) as e: sample.main(config.load(argv))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_sample_interactive_keeps_the_conversation_in_the_cache(tmp_path, monkeypatch, capsys):
    sample_checkpoint(tmp_path)
    past_the_context = "on the rat sat\n" * 5 + "Ratatouille, Ratatouille\n"
    monkeypatch.setattr(sys, "stdin", None)
    assert sample_main(capsys, f"--out_dir={tmp_path}/ckpt.pt", "--interactive") == ""        # stdin closed: no input
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nthe mat\n" + past_the_context))
    fed, hidden = [], model_py.GPT.hidden
    spy = lambda self, idx, cache=None: fed.append(idx[0].tolist()) or hidden(self, idx, cache)
    monkeypatch.setattr(model_py.GPT, "hidden", spy)
    sample_main(capsys, f"--out_dir={tmp_path}", "--interactive", "--max_new_tokens=5", "--temperature=0")
    eot, at = sample_TOK.special_tokens["<|endoftext|>"], [i for i, ids in enumerate(fed) if len(ids) > 1]
    first, second = sample_TOK.encode("the cat\n"), sample_TOK.encode("the mat\n")    # the first step feeds their last ids
    assert fed[at[0]] == [eot] + first[:-1] and fed[at[0] + 1] == first[-1:] and len(at) == 8
    assert fed[at[1]][1:] == second[:-1] and fed[at[1] + 1] == second[-1:]          # no id is fed twice
    model, ids = sample.load(config.Config(out_dir=str(tmp_path)))[0], sum(fed[:at[1] + 2], [])
    after = fed[at[1] + 2][0]                       # the second answer begins with the argmax after the whole text so far
    assert model(torch.tensor([ids]))[0][0, -1, :sample_TOK.vocab_size].argmax().item() == after


def sample_talk(folder, monkeypatch, lines, *argv):
    """The Row objects of a conversation in which `lines` are typed, the first of which holds its beginning."""
    rows, Row = [], sample.Row
    with monkeypatch.context() as m:
        m.setattr(sample, "Row", lambda *args: rows.append(Row(*args)) or rows[-1])
        m.setattr(sys, "stdin", io.StringIO(lines))
        sample.main(config.load([f"--out_dir={folder}", "--interactive", "--max_new_tokens=5", "--temperature=0", *argv]))
    return rows


def test_sample_interactive_speaks_the_template_of_a_chat_model(tmp_path, monkeypatch, capsys):
    path = sample_checkpoint(tmp_path)
    checkpoint = model_py.load_checkpoint(path) | dict(meta=dict(form="answers"))
    checkpoint["config"]["alien"], head = 3, checkpoint["model"]["lm_head.weight"]
    system, eot = "System: purr\n\n", sample_TOK.special_tokens["<|endoftext|>"]
    (tmp_path / "system.txt").write_text(system)
    likely = -3 * head[eot]                 # makes it the likeliest token of these answers
    for more, begin, finish in (([], [eot], "length"), ([], [eot], "end"),
                                ([f"--start=FILE:{tmp_path}/system.txt"], sample_TOK.encode(system), "end")):
        if finish == "end": head[eot] = likely
        model_py.save_checkpoint(path, checkpoint)
        _, first, second = sample_talk(tmp_path, monkeypatch, "the cat\nvu\n", *more)
        said = capsys.readouterr()
        assert "knobs that this version ignores: alien=3" in said.err and f"{first.text}\n" in said.out and second.text in said.out
        assert first.prompt == begin + sample_TOK.encode("User: the cat\n\nAssistant:")     # no answer was before
        assert first.finish == finish and second.prompt.count(eot) == begin.count(eot) + 1      # one more, in either case
        assert second.prompt == first.prompt + first.tokens + sample_TOK.encode("User: vu\n\nAssistant:")


def test_sample_interactive_begins_with_the_prompt_and_survives_a_line_too_long(tmp_path, monkeypatch):
    sample_checkpoint(tmp_path)
    for more in ([], ["--past_context=error"]):
        lines = "the mat\n" + "xyz " * 40 + "\nvu\n"
        _, first, too_long, last = sample_talk(tmp_path, monkeypatch, lines, "--start=the cat sat. ", *more)
        assert first.prompt == sample_TOK.encode("the cat sat. ") + sample_TOK.encode("the mat\n") and not too_long.tokens
        assert last.prompt == first.ids + sample_TOK.encode("vu\n")
        ids = torch.tensor([last.ids])
        logits = sample.load(config.Config(out_dir=str(tmp_path)))[0](ids)[0]
        assert logits[0, len(last.prompt) - 1:-1, :sample_TOK.vocab_size].argmax(-1).tolist() == last.tokens


def test_sample_interrupted_answers_leave_the_conversation_whole(tmp_path, monkeypatch):
    """Ctrl-C during the prefill of a line, and in the middle of an answer: the next answer still follows from the whole text."""
    sample_checkpoint(tmp_path)
    hidden, calls = model_py.GPT.hidden, itertools.count(1)
    def interrupted(self, idx, cache=None):
        x = hidden(self, idx, cache)
        if next(calls) in (1, 5): raise KeyboardInterrupt           # prefill of line 1; step 3 of answer 2
        return x
    monkeypatch.setattr(model_py.GPT, "hidden", interrupted)
    _, first, second, third = sample_talk(tmp_path, monkeypatch, "the cat\nthe mat\non the rat\n")
    monkeypatch.setattr(model_py.GPT, "hidden", hidden)
    model = sample.load(config.Config(out_dir=str(tmp_path)))[0]
    assert (len(first.tokens), len(second.tokens), third.finish) == (0, 2, "length")
    assert (first.seed, second.seed, third.seed) == (1337, 1338, 1339)
    assert second.prompt == first.prompt + sample_TOK.encode("the mat\n")
    assert third.prompt == second.ids + sample_TOK.encode("on the rat\n")
    for row in (second, third):
        ids = torch.tensor([row.ids])
        assert model(ids)[0][0, len(row.prompt) - 1:-1, :sample_TOK.vocab_size].argmax(-1).tolist() == row.tokens


def test_sample_visualize_is_one_page_with_attention_that_sums_to_one(tmp_path, capsys):
    sample_checkpoint(tmp_path, window_pattern="SL", window=3)
    path = tmp_path / "v.html"
    sample_main(capsys, f"--out_dir={tmp_path}", "--start=</script> the cat", "--max_new_tokens=9", f"--visualize={path}")
    page = path.read_text()
    spans = re.findall(r'<span(?: title="(.*?)" style=".*?")?>(.*?)</span>', page, re.S)
    spans = [tuple(map(html.unescape, span)) for span in spans]
    assert "".join(text for _, text in spans).startswith("</script> the cat")
    assert page.count("</script>") == 1 and "http" not in page
    maps = torch.tensor(list(base64.b64decode(re.search(r'atob\("(.*?)"\)', page)[1]))).view(2, 4, len(spans), len(spans)) / 255
    assert (maps.sum(-1) - 1).abs().max() < 0.06 and (maps.triu(1) == 0).all()
    assert (maps[0].tril(-3) == 0).all() and (maps[1].tril(-3) > 0).any()           # the first layer has a window of 3
    model, ids = sample.load(config.Config(out_dir=str(tmp_path)))[0], sample_TOK.encode("</script> the cat")
    p = model(torch.tensor([ids]))[0][0, :, :sample_TOK.vocab_size].softmax(-1)
    for i, (title, text) in enumerate(spans[1:len(ids)]):       # title: the token, then the likeliest, with probabilities
        own, *likely = [(float(line.split("%")[0]), line.split("% ", 1)[1]) for line in title.split("\n")]
        assert own == (pytest.approx(100 * p[i, ids[i + 1]].item(), abs=0.06), repr(text)) and len(likely) == 8
        assert likely[0] == (pytest.approx(100 * p[i].max().item(), abs=0.06), repr(sample_TOK.decode([p[i].argmax().item()])))
        assert likely == sorted(likely, key=lambda x: -x[0])
    (tmp_path / "p.txt").write_text("the cat\nthe mat\n")               # the page shows the first, the second goes on undisturbed
    args = [f"--out_dir={tmp_path}", f"--prompts={tmp_path}/p.txt", "--batch_size=1"]
    assert sample_json(capsys, *args, f"--visualize={path}") == sample_json(capsys, *args)


def test_sample_rope_scaling_at_sampling_time_extends_the_context(tmp_path):
    sample_checkpoint(tmp_path)
    for kind in ("linear", "ntk", "yarn", "llama3"):
        cfg = config.load([f"--out_dir={tmp_path}", f"--rope_scaling={kind}", "--rope_factor=2"])
        model = sample.load(cfg)[0]
        assert model.config.block_size == 128 and model(torch.randint(280, (1, 128)))[0].isfinite().all()
    sample_checkpoint(tmp_path, rope_scaling="llama3", rope_factor=4.0, rope_trained=20)
    assert sample.load(cfg)[0].config.block_size == 40                  # 2 x rope_trained, not 2 x block_size
    assert sample.load(dataclasses.replace(cfg, dtype="bfloat16"))[0].transformer.wte.weight.dtype == torch.bfloat16


# ---- other people's models: loaded by init_from, written by --export

HF_TEXTS = ["the cat", " déjà vu — 🙂\n\n  x", "'s 12345 ", "क्षि 한국어 \u200d", "\t\r\n \u00a0"]


def hf_tokens_equal(ours, theirs):
    rng = random.Random(0)
    for text in HF_TEXTS + [bpe_random_text(rng, 40) for _ in range(100)]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == ours.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
def test_sample_from_a_folder_is_transformers_greedy_text_peer(name, tmp_path, capsys):
    """50 tokens of two prompts through sample.py itself, with its prefill and ragged cache, equal transformers' generate."""
    theirs = hf_made(name, vocab_size=280)
    theirs.save_pretrained(tmp_path)
    sample_TOK.to_hf(str(tmp_path / "tokenizer.json"))
    (tmp_path / "p.txt").write_text("the cat\non the mat, the rat sat\n")
    argv = ["--temperature=0", "--max_new_tokens=50", "--past_context=error"]
    lines = sample_json(capsys, f"--init_from={tmp_path}", f"--prompts={tmp_path}/p.txt", *argv)
    for line, prompt in zip(lines, ("the cat", "on the mat, the rat sat"), strict=True):
        idx = torch.tensor([sample_TOK.encode(prompt)])
        expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=50, do_sample=False, pad_token_id=0,
                                   eos_token_id=sample_TOK.special_tokens["<|endoftext|>"])[0, idx.shape[1]:].tolist()
        ended = line["finish"] == "end"
        assert line["tokens"] == len(expected) and line["text"] == sample_TOK.decode(expected[:-1] if ended else expected)


@pytest.mark.parametrize("kw", [dict(), dict(n_kv_head=4, pos="learned", norm="layernorm", mlp="gelu", qk_norm=False),
                                dict(qk_norm=False, mlp="swiglu")])
def test_sample_export_loads_in_transformers_peer(kw, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    sample_checkpoint(tmp_path / "run", **kw)
    for dtype in ("float32", "bfloat16"):
        folder = str(tmp_path / dtype)
        out = sample_main(capsys, f"--out_dir={tmp_path}/run", f"--export={folder}/", f"--dtype={dtype}")
        assert f"-> {folder}: " in out and f"{dtype}, 280 tokens" in out
    ours, tok = sample.load(config.Config(out_dir=str(tmp_path / "run"), compile=True))[:2]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32").eval()
    idx = torch.tensor([tok.encode("the cat sat on the mat")])
    with torch.no_grad(): torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], atol=1e-4, rtol=1e-4)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "float32")
    hf_tokens_equal(tok, auto)
    end = tok.special_tokens["<|endoftext|>"]
    assert auto.eos_token_id == theirs.generation_config.eos_token_id == end
    assert auto.encode("a<|endoftext|>b") == tok.encode("a<|endoftext|>b", "all")
    with pytest.raises(ValueError, match="exists: delete it or choose another"):
        sample.main(config.load([f"--out_dir={tmp_path}/run", f"--export={folder}"]))
    sample_checkpoint(tmp_path / "capped", **{**kw, "logit_softcap": 9.0})
    with pytest.raises(ValueError, match="logit_softcap=9.0"):
        sample.main(config.load([f"--out_dir={tmp_path}/capped", f"--export={tmp_path}/no"]))
    assert sorted(os.listdir(tmp_path)) == ["bfloat16", "capped", "float32", "run"]


def test_sample_llama3_texts_begin_with_its_token():
    tok = bpe.Tokenizer.train(["ab ab"], 260, special_tokens=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))
    tok.first = sample.ids_of(tok, sample.BEGIN, sample.ENDOFTEXT)[:1]
    assert tok.first == [tok.special_tokens["<|begin_of_text|>"]]
    assert sample.read_prompts(config.Config(start="ab"), tok, 64)[0] == [tok.first + tok.encode("ab")]
    assert sample.read_prompts(config.Config(), tok, 64)[0] == [tok.first]
    assert sample.read_prompts(config.Config(start="<|begin_of_text|>ab"), tok, 64)[0] == [tok.first + tok.encode("ab")]     # once
    line = json.dumps(dict(ctx="ab ab ab", endings=["a", "bb"], label=1))
    for size in (64, 4): assert bench.read_task("t", [line], tok, size)[0][0][:2] == tok.first + tok.encode("ab ab ab")[-size + 3:][:1]
    assert sample.read_stops(config.Config(), tok)[0] == {tok.special_tokens["<|end_of_text|>"], tok.special_tokens["<|eot_id|>"]}


def test_sample_llama3_export_begins_texts_peer(tmp_path):
    """transformers' tokenizer of an export puts <|begin_of_text|> before each text, as Llama 3's own does; ours does not double it."""
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    tok = bpe.Tokenizer.train(["ab ab"], 260, special_tokens=("<|begin_of_text|>", "<|end_of_text|>"))
    model = sample_gpt(vocab_size=260, qk_norm=False, mlp="swiglu")
    sample_checkpoint(tmp_path / "run", model, tok.to_dict())
    sample.main(config.load([f"--out_dir={tmp_path}/run", f"--export={tmp_path}/hf"]))
    auto, begin = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), tok.special_tokens["<|begin_of_text|>"]
    assert auto.encode("ab cd") == [begin, *tok.encode("ab cd")]
    assert auto("ab", "cd").input_ids == [begin, *tok.encode("ab"), begin, *tok.encode("cd")]
    assert Tokenizer.load(str(tmp_path / "hf" / "tokenizer.json")).encode("ab cd") == tok.encode("ab cd")


def test_sample_export_keeps_the_chat_template_peer(tmp_path):
    """transformers writes a conversation out as prepare.py does, and the folder is a chat model here, too."""
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    path = sample_checkpoint(tmp_path)
    for chat in (False, True):
        if chat: model_py.save_checkpoint(path, model_py.load_checkpoint(path) | dict(meta=dict(form="answers")))
        sample.export(config.Config(out_dir=str(tmp_path), export=str(folder := tmp_path / f"hf{chat}")))
        assert sample.load(config.Config(init_from=str(folder)))[1].chat == chat
    turns = [dict(role=role, content=f"the {role}\nsat") for role in ("system", "user", "assistant", "user", "assistant")]
    want = "".join(text + "<|endoftext|>" * counts for text, counts in prepare.parse(dict(messages=turns))[1])
    write = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template
    assert write(turns, tokenize=False) == want
    assert want.startswith(write(turns[:-1], tokenize=False, add_generation_prompt=True) + " the assistant")


def test_train_export_transformers_and_back_peer(monkeypatch, train_dir, tmp_path, capsys):
    """Train, export, load in transformers, fine-tune the export: data prepared with the same tokenizer can be used again."""
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    trained = train_here(monkeypatch, train_dir, tmp_path, max_iters=10)
    folder = str(tmp_path / "hf")
    sample_main(capsys, f"--out_dir={tmp_path}/run", f"--export={folder}")
    ours, tok = model_py.GPT.load(str(tmp_path / "run" / "ckpt.pt")), Tokenizer.from_dict(trained["tokenizer"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    hf_tokens_equal(tok, auto)
    idx = torch.tensor([tok.encode("This module provides")])[:, :12]
    with torch.no_grad(): torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], atol=1e-4, rtol=1e-4)
    assert theirs(idx).logits.abs().max() > 0.1
    start = ["--start=module", "--max_new_tokens=30", "--seed=3"]
    text = sample_main(capsys, f"--out_dir={tmp_path}/run", "--dtype=float32", *start)
    assert sample_main(capsys, f"--init_from={folder}", *start) == text
    # The folder decides the shape; the config only a smaller block_size and dropout
    still = dict(learning_rate=0, matrix_lr=0, embedding_lr=0, unembedding_lr=0)
    other = dict(still, n_layer=4, n_head=4, n_embd=64, vocab_size=999, max_iters=2, block_size=8)
    tuned = train_here(monkeypatch, train_dir, tmp_path, out="tuned", init_from=folder, **other)
    said = capsys.readouterr().out.split("sets: ")[1].split("\n")[0]
    assert "n_layer 4 -> 2" in said and "vocab_size 999 -> 300" in said and "block_size" not in said
    assert tuned["config"]["n_layer"] == 2 and tuned["config"]["block_size"] == 8 and tuned["tokenizer"]["hash"] == tok.hash
    for name, p in trained["model"].items(): assert torch.equal(tuned["model"][name], p), name      # every learning rate was 0
    # Such a run resumes with the same command line, though the shape in it is another
    on = dict(other, init_from="resume", max_iters=4, learning_rate=1e-2)
    resumed = train_here(monkeypatch, train_dir, tmp_path, out="tuned", **on)
    assert resumed["step"] == 4 and resumed["config"]["n_layer"] == 2 and resumed["config"]["init_from"] == folder
    again = train_here(monkeypatch, train_dir, tmp_path, out="tuned", **{**other, "init_from": "resume", "max_iters": 5})
    assert again["step"] == 5 and not equal_states(again, trained)
    sample_main(capsys, f"--out_dir={tmp_path}/tuned", "--max_new_tokens=5", "--sinks=1")
    # Data of another tokenizer is refused; missing data is prepared with the model's tokenizer
    bpe.Tokenizer.train(["other text"], 300).to_hf(os.path.join(folder, "tokenizer.json"))
    with pytest.raises(ValueError, match="data/tiny was prepared with tokenizer='bpe', not '.*tokenizer.json'"):
        train_here(monkeypatch, train_dir, tmp_path, out="none", init_from=folder, **other)
    new = train_here(monkeypatch, train_dir, tmp_path, out="new", init_from=folder, dataset="new", **other)
    hash_of_folder = Tokenizer.from_hf(os.path.join(folder, "tokenizer.json")).hash
    assert new["meta"]["tokenizer_hash"] == new["tokenizer"]["hash"] == hash_of_folder
    monkeypatch.chdir(train_dir)
    prepare.main(config.load(train_words(init_from=folder, dataset="new", vocab_size=257)))
    assert "data/new is prepared already, nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="init_from='gpt3' is none of scratch, resume, gpt2, "):
        train_here(monkeypatch, train_dir, tmp_path, out="none", init_from="gpt3")


def test_sample_gpt2_is_downloaded_once_peer(here, monkeypatch, capsys):
    """From a hub on 127.0.0.1: cut off, resumed, verified by hash; then read from disk; a gated model is a one-line error."""
    pytest.importorskip("transformers", reason="not installed: pip install transformers")
    (here / "source").mkdir()
    bpe.Tokenizer.train(["ab"], 257).to_hf(str(here / "source" / "tokenizer.json"))
    hf_made("gpt2", vocab_size=257).save_pretrained(here / "source")
    asked, cut = [], [True]

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Range")))
            if "medium" in self.path: return self.send_error(401)
            if "large" in self.path: return self.send_error(403)
            body = (here / "source" / self.path.rsplit("/", 1)[1]).read_bytes()
            start = int(self.headers["Range"][6:-1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            if self.path.endswith("safetensors"): self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.end_headers()
            half = self.path.endswith("safetensors") and cut and cut.pop()
            self.wfile.write(body[start:start + 9000 if half else None])
            self.close_connection = True

    monkeypatch.setattr(prepare.time, "sleep", lambda s: None)
    with served(Hub) as url:
        monkeypatch.setattr(prepare, "HUB", url)
        words = ["--init_from=gpt2", "--start=ab", "--max_new_tokens=9", "--temperature=0"]
        text = sample_main(capsys, *words)
        weights = [r for p, r in asked if p == "/gpt2/resolve/main/model.safetensors"]
        assert len(asked) == 4 and len(weights) == 2 and weights[0] == "bytes=0-" and int(weights[1][6:-1]) > 8000
        assert sorted(os.listdir("data/hf/gpt2")) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert text == sample_main(capsys, *words) == sample_main(capsys, "--init_from=data/hf/gpt2", *words[1:]) and len(asked) == 4
        for name, code in (("gpt2-medium", 401), ("gpt2-large", 403)):
            with pytest.raises(ValueError, match=f"cannot download http.*{name}/resolve/main/config.json: the server says {code}"):
                sample.main(config.load([f"--init_from={name}"]))
            assert not os.listdir(f"data/hf/{name}")


# ======================================================== bench.py: tables and evaluations by plain computation

def test_bench_fit_law_recovers_a_law():
    compute = np.array([1e12, 3e12, 1e13, 4e13, 2e14])
    E, A, a = bench.fit_law(compute, 1.7 + 40 * compute ** -0.14)
    assert E == pytest.approx(1.7, abs=0.02) and a == pytest.approx(0.14, abs=0.01) and A == pytest.approx(40, rel=0.2)


def test_bench_size_counts_what_the_model_has(capsys, tmp_path):
    bench.main(["size", os.path.join(HERE, "config", "gpt2_124m_classic.py")])
    out = capsys.readouterr().out
    assert re.search(r"^all +124,439,808 +100.0%", out, re.M) and re.search(r"^positions +786,432", out, re.M)
    # FLOPs: 6 * (the parameters without 786,432 positions) + 12 layers * 12 * 768 * 1024; hours: / (0.4 * 989e12) / 3600
    assert "855.2 MFLOP a token; this run: 9,999,745,024 tokens, 80.4 a parameter, 8.55e+18 FLOP\n" in out
    assert "2,488,796,160 tokens, 2.13e+18 FLOP" in out and re.search(r"^H100  +6.0 +1.5$", out, re.M)
    assert re.search(r"^MLP +56,669,184 +45.5%\n", out, re.M) and re.search(r"^all +24,223.19\n", out, re.M)
    published = dict(model_type="gpt2", n_positions=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768)
    (tmp_path / "config.json").write_text(json.dumps(published | dict(layer_norm_epsilon=1e-5)))
    bench.main(["size", f"--init_from={tmp_path}", "--lora_rank=8", "--n_layer=3", "--block_size=2048"])     # the folder's shape
    lora = 12 * 4 * 2 * 8 * 768                     # layers, matrices, A and B, rank, width
    assert re.search(rf"^positions +786,432 .*^gradients +{lora * 4 / 2 ** 20:.2f}\n", capsys.readouterr().out, re.M | re.S)


def test_bench_takes_turns_and_the_median_counts(monkeypatch):
    order, values = [], iter((1, 10, 2, 20, 9, 30))
    assert bench.take_turns({"a": 1, "b": 2}, 3, lambda work: order.append(work) or next(values)) == {"a": 2, "b": 20}
    assert order == [1, 2] * 3
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: time.sleep(0.1))
    assert bench.seconds(lambda: None) >= 0.1                       # what it left running on a GPU counts
    for name, value in dict(is_available=True, memory_allocated=2 ** 21, max_memory_allocated=2 ** 23).items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: order.append(name) or value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: order.append("reset"))
    assert bench.memory_of(lambda: order.append("work")) == (None, 6.0)
    assert order[6:] == ["is_available", "reset", "memory_allocated", "work", "max_memory_allocated"]


def test_bench_train_reports_both_recipes(capsys, monkeypatch):
    monkeypatch.setattr(bench.torch, "compile", lambda model: model)        # only the table is tested
    monkeypatch.setitem(train.PEAK_FLOPS, "cpu", 1e9)
    monkeypatch.setattr(bench, "take_turns", lambda steps, rounds: {
        name: 2.0 if name == "product" else 1e-5 * 2 ** i for i, name in enumerate(steps)})
    trained = []
    monkeypatch.setattr(train, "update", lambda optimizers, bad: trained.append(not bad and all(
        p.grad is not None for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])))
    words = [f"--{k}={v}" for k, v in dict(n_layer=1, n_head=2, n_embd=32, vocab_size=64, block_size=16).items()]
    bench.main(["train", "--batch_size=2", "--device=cpu", *words])
    row = r"^(as configured|classic).* sdpa(?:, compiled)? +(\S+) +(\S+) +(\S+) +(\S+) +(\S+) +- +(\S+) x"
    rows = re.findall(row, capsys.readouterr().out, re.M)
    assert [r[0] for r in rows] == ["classic", "classic", "as configured", "as configured"] and trained == [True] * 4
    for i, words in ((0, words + [os.path.join(HERE, "config", "classic.py")]), (3, words)):
        rate = model_py.GPT(config.load(words).model()).estimate_flops() * 32 / (1e-5 * 2 ** i)
        assert rows[i][1:3] == (f"{0.01 * 2 ** i:.2f}", f"{3_200_000 // 2 ** i:,}")
        assert rows[i][3:] == (f"{rate / 1e12:.2f}", f"{rate / 1e9:.1%}", f"{rate / 2048 ** 3:.1%}", f"{1 / 2 ** i:.2f}")


def test_bench_logs_are_read_scaled_and_missing_ones_named(tmp_path, capsys):
    def log(i, tokens, bits):
        record = dict(step=9, tokens=tokens, seconds=1.0, val_loss=3 * bits, val_bpb=bits)
        records = record | dict(step=3, tokens=1, val_bpb=9.0), record, dict(step=9, tokens=5, loss=1.0)        # the second counts
        (tmp_path / str(i) / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for i, n in enumerate((16, 32, 64)):
        os.makedirs(tmp_path / str(i))
        shape = vars(config.GPTConfig(n_layer=1, n_head=2, n_embd=n, vocab_size=64, block_size=16))
        (tmp_path / str(i) / "config.json").write_text(json.dumps(shape | dict(max_iters=9 + i // 2, dataset="ab"[i // 2])))
        log(i, 1000 * 4 ** i, (3, 2.25, 2)[i])
    bench.main(["scaling", *(str(tmp_path / str(i)) for i in range(3))])
    out, compute = capsys.readouterr().out, model_py.GPT(config.GPTConfig(**shape)).estimate_flops() * 16000
    assert "2 has not ended: its loss at step 9" in out and "1 has not ended" not in out and "three runs fit any law" in out
    assert out.count("has other text than") == 1 and re.search(rf"{re.escape(f'{compute:.3g}')} +2.0000 +(2.000|1.999)", out)
    E, A, a = map(float, re.search(r"= (\S+) \+ (\S+) \* FLOP\^-(\S+)", out).groups())
    assert float(re.search(r"^4 x +(\S+)", out, re.M)[1]) == pytest.approx(E + A * (4 * compute) ** -a, rel=1e-2)
    with open(tmp_path / "2" / "log.jsonl", "a") as f: f.write('{"step": 10, "lo\n{"st')        # as after a crash
    assert [r["step"] for r in bench.read_run(tmp_path / "2")[1]] == [3, 9, 9]
    os.makedirs(tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text("{")
    for i, bits in ((3, 3.5), (4, 4.0), (5, math.nan)):
        shutil.copytree(tmp_path / "2", tmp_path / str(i))
        log(i, 8 ** i, bits)
    runs = lambda digits: [str(tmp_path / i) for i in digits]
    for argv, message in ((["scaling", *runs("034")], "does not fall as their compute grows"),
                          (["scaling", *runs("015")], "does not fall as their compute grows"),
                          (["scaling", *runs("001")], "at least three runs"),
                          (["plot", str(tmp_path / "bad")], "config.json is damaged"),
                          (["plot", str(tmp_path)], "give the out_dir of a run"), (["plot"], "name the runs"),
                          (["attention", "x"], "attention takes no arguments, not 'x'"), (["x"], "unknown benchmark 'x'")):
        with pytest.raises(ValueError, match=message): bench.main(argv)


def test_bench_plot_peer_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install matplotlib")
    for name in ("a", "b"):
        os.makedirs(tmp_path / name)
        lines = [dict(step=i, tokens=10 * i, seconds=i / 2, loss=5 / i) for i in range(1, 9)]
        lines += [dict(step=8, tokens=80, seconds=4.0, val_loss=v, val_bpb=v / 4) for v in (1.5, 1.0, 2.0)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        (tmp_path / name / "config.json").write_text("{}")
    shown, plot = [], bench.plot
    spied = lambda path, panels, *args, **kw: (shown.extend((panels, kw)), plot(path, panels, *args, **kw))
    monkeypatch.setattr(bench, "plot", spied)
    bench.main(["plot", str(tmp_path / "a"), str(tmp_path / "b")])
    pale, dots = f"_{tmp_path / 'a'}", f"{tmp_path / 'a'}, best 0.2500"               # bits per byte: the runs' tokenizers may differ
    assert [shown[0][axis][pale][0] for axis in ("step", "tokens", "seconds")] == [(1, 1.25), (10, 1.25), (0.5, 1.25)]
    assert shown[0]["tokens"][dots] == [(80, 0.375), (80, 0.25), (80, 0.5)] and "bits per byte" in shown[1]["ylabel"]
    (tmp_path / "b" / "log.jsonl").write_text(json.dumps(dict(step=1, tokens=1, seconds=1, loss=1.0)))
    bench.main(["plot", str(tmp_path / "a"), str(tmp_path / "b")])                    # b has no bits per byte yet
    assert f"{tmp_path / 'a'}, best 1.0000" in shown[2]["step"] and "nats per token" in shown[3]["ylabel"]
    assert (tmp_path / "a" / "loss.png").read_bytes()[:4] == b"\x89PNG"


@needs_flash
def test_bench_attention_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available(): pytest.skip("there is a GPU here: python bench.py attention measures it")
    bench.main(["attention"])
    out = capsys.readouterr().out
    assert "no CUDA GPU: speed not measured" in out and re.search(r"T +1024: flash +0.05 +naive +24.0 +512 x", out)
    errors = list(map(float, re.findall(r"\d\.\de-\d\d", out)))
    assert all(error < 1e-5 for error in errors) and len(errors) == 4


@needs_flash
@pytest.mark.parametrize("B, H, K, T, S, mask", [
    (1, 2, 1, 33, 33, "causal"), (2, 1, 1, 20, 20, "full"), (1, 2, 2, 24, 24, "window"), (2, 4, 2, 1, 40, "full")])
def test_bench_attention_gives_every_peer_the_same_task(monkeypatch, B, H, K, T, S, mask):
    if torch.cuda.is_available(): pytest.skip("there is a GPU here, and this is the CPU's rehearsal")
    monkeypatch.setattr(bench, "WINDOW", 7)
    done = []
    def measure(work):
        y = work()
        done.append(torch.cat([t.float().flatten() for t in (y if isinstance(y, tuple) else (y,))]))
        return float(len(done))
    found = bench.attention_case(B, H, K, T, S, 16, mask, torch.device("cpu"), measure)
    first = done[:len(found)]                                       # by turns: the first round has each once
    assert len(done) == 3 * len(found) and found["forward", "ours"][1] == "-"
    names = [name for name in ("ours", *bench.BACKENDS) if ("forward", name) in found]
    assert names[0] == "ours" and names[-1] == "MATH" and "CUDNN_ATTENTION" not in names      # cuDNN refuses a CPU
    passes = ["forward", "backward"] if T > 1 else ["forward"]
    assert list(found) == [(which, name) for name in names for which in passes]
    for key, value in zip(found, first):
        assert torch.allclose(value, first[list(found).index((key[0], "MATH"))], atol=0.03, rtol=0.03) and value.abs().max() > 0.1


def test_bench_attention_writes_its_tables(here, monkeypatch, capsys):
    """The part that needs a GPU, with a pretended one: everything but the measuring."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch, "randn", lambda *shape, **kw: torch.zeros(2, 1, 1))
    monkeypatch.setattr(bench, "take_turns", lambda works, rounds, measure: {name: 2.0 for name in works})
    times = {("forward", "ours"): (1.0, 1.5), ("forward", "MATH"): (4.0, 1.5),
             ("backward", "ours"): (2.0, 1.5), ("backward", "MATH"): (8.0, 1.5)}
    monkeypatch.setattr(bench, "attention_case",
                        lambda B, H, K, T, S, D, *rest: {key: v for key, v in times.items() if T > 1 or key[0] == "forward"})
    pytest.importorskip("triton", reason="do_bench is Triton's: pip install triton (Linux only)")
    with warnings.catch_warnings(): bench.main(["attention"])
    out = capsys.readouterr().out
    assert "matrix product 8192^3: 550 TFLOP/s" in out
    rows = list(csv.DictReader(open("out/bench/attention.csv")))
    assert len(rows) == 26 * 4 + 2 * 2 and all(r["time / ours"] == ("1.0" if r["peer"] == "ours" else "4.0") for r in rows)
    for r in rows:
        B, H, T, S, D = (int(r[key]) for key in "BHTSD")
        pairs = dict(full=T * S, causal=T * S / 2, window=sum(min(i, 1024) for i in range(1, T + 1)))[r["mask"]]
        rate = 4 * B * H * D * pairs * (2.5 if r["pass"] == "backward" else 1) / float(r["us"]) / 1e6
        assert [float(r["TFLOP/s"]), float(r["% of peak"])] == pytest.approx([rate, rate / 5.497558], rel=1e-3)
        assert r["K"] == "4" or r["mask"] == "window" or [B * T, H * D] == [16384, 2048]
    if importlib.util.find_spec("matplotlib"): assert Path("out/bench/attention.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_tokenizer_compares_what_is_installed(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("the cat sat on the mat, the dog did not: \u00fc\n" * 99 + "<|endoftext|>")
    command = [sys.executable, os.path.join(HERE, "bench.py"), "tokenizer"]
    run = subprocess.run([*command, str(tmp_path / "text"), "--vocab_size=290"], capture_output=True, text=True, check=True)
    assert re.search(r"^bpe .* same$", run.stdout, re.M) and re.search(r"^tiktoken .* same$", run.stdout, re.M)
    assert "DIFFERENT" not in run.stdout and 10 < float(re.search(r"^bpe +\S+ +\S+ +(\S+)", run.stdout, re.M)[1]) < 2000       # MB
    run = subprocess.run([*command, "nothing"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1 and "nothing" in run.stderr
    for words in (["a.txt", "b.txt"], [str(tmp_path)]):
        with pytest.raises(ValueError, match=f"{words[-1]}: name one file, and no folder"): bench.bench_tokenizer(words)
    runs = iter([(1, 9), (40, 5), (4, 7), (2, 8)] + 3 * [(1, 9)])           # pretended seconds and MB; one of 40 s runs once
    monkeypatch.setattr(bench, "peer", lambda name: name == "rustbpe")
    monkeypatch.setattr(bench, "contend", lambda job, name, *words: dict(zip(("seconds", "MB"), next(runs)), tokens=2_000_000, digest=name))
    (tmp_path / "text").write_bytes(b"x" * 6_000_000)
    bench.bench_tokenizer([str(tmp_path / "text")])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:4]] == [
        ["bpe", "2", "3.00", "9", "3.00", "same"], ["rustbpe", "40", "0.15", "5", "3.00", "DIFFERENT"]]


def test_bench_sample_has_a_row_for_each_way(capsys, monkeypatch):
    shape = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=64, block_size=64, max_new_tokens=12, device="cpu")
    bench.main(["sample", *(f"--{k}={v}" for k, v in shape.items())])
    rows = re.findall(r"^(.+?)  +(\d+) +(\d+) +(\d+) +[\d,.]+ .* ([\d.]+) x$", capsys.readouterr().out, re.M)
    assert rows[0] == ("every token anew, as nanoGPT, float32", "1", "1", "12", "1.0")
    for kind in ("float32", "bfloat16", "bfloat16, int8 weights"):
        shapes = [tuple(map(int, row[1:4])) for row in rows if row[0] == f"sample.py, {kind}"]
        assert shapes == [(1, 1, 12), (4, 16, 32), (16, 16, 32), (64, 16, 16)]
    def decode(model, texts, c, V, stats):          # pretended: slow first steps, then two a second
        stats.update(prompt_tokens=30, prompt_seconds=2)
        for i in range(c.max_new_tokens): yield stats.update(tokens=len(texts), steps=1, bytes=3e9, seconds=9 if i < 4 else 0.5)
    monkeypatch.setattr(sample, "decode", decode)
    monkeypatch.setattr(bench, "seconds", lambda work: 4)
    bench.main(["sample", *(f"--{k}={v}" for k, v in shape.items())])
    out = re.sub(" +", " ", capsys.readouterr().out)
    assert "float32 1 1 12 3.00 - - 1.0 x" in out and "bfloat16 4 16 32 8.00 15.00 6.00 2.7 x" in out
    for words, message in ((["--out_dir=out/x"], "random weights of a config's size"), (["--block_size=23"], "take at least 24")):
        with pytest.raises(ValueError, match=message): bench.main(["sample", *words])


def test_bench_context_agrees_with_the_model_inside_its_context(here, capsys):
    model, n = sample_gpt(block_size=16), 16
    sample_checkpoint("out/x", model)
    Path("out/x/config.json").write_text('{"dataset": "d"}')
    Path("out/x/log.jsonl").write_text("")
    os.makedirs("data/d")
    data = np.random.default_rng(0).integers(280, size=8 * n + 30).astype("<u2")
    data.tofile("data/d/val.bin")
    Path("data/d/meta.json").write_text('{"tokenizer_hash": "another"}')
    with pytest.raises(ValueError, match="prepared again"): bench.main(["context", "--out_dir=out/x", "--device=cpu"])
    Path("data/d/meta.json").write_text(json.dumps({"tokenizer_hash": sample_TOK.hash}))
    bench.main(["context", "--out_dir=out/x", "--device=cpu"])
    out = capsys.readouterr().out
    rows, full = (dict(re.findall(rf"^(as trained|rope_scaling=\w+|window, sinks=\d) +{which}", out, re.M))
                  for which in (r"([\d,.]+) ", "(.*)"))
    texts = torch.tensor(np.stack([data[i:i + n + 1] for i in np.linspace(0, 29, 24).astype(int)]).astype(np.int64))
    logp = model(texts[:, :-1])[0].log_softmax(-1).gather(2, texts[:, 1:, None])[:, n // 2:]
    assert len(set(full.values())) == 7                             # past the context all differ
    inside = [float(x.replace(",", "")) for x in rows.values()]
    assert inside == pytest.approx(7 * [math.exp(-logp.mean())], rel=1e-3)
    scaled = sample_gpt(block_size=16, rope_scaling="yarn", rope_factor=2.0)        # trained at 8: row none is unscaled
    scaled.load_state_dict(model.state_dict())
    sample_checkpoint("out/x", scaled)
    bench.main(["context", "--out_dir=out/x", "--device=cpu"])
    rows = re.findall(r"^(?:as trained|rope_scaling=\w+) +[\d,.]+ +([\d,.]+) ", plain := capsys.readouterr().out, re.M)
    assert len(set(rows)) == 5
    bench.main(["context", "--out_dir=out/x", "--device=cpu", "--quantize=int8"])
    assert (out := capsys.readouterr().out).count("rope_scaling=") == 4 and out != plain
    data[:8 * n].tofile("data/d/val.bin")
    with pytest.raises(ValueError, match="val.bin has 128 tokens"): bench.main(["context", "--out_dir=out/x", "--device=cpu"])
    with pytest.raises(ValueError, match="give the out_dir of a run"): bench.main(["context", "--out_dir=out/y"])
    sample_checkpoint("out/x", sample_gpt(block_size=3))
    bench.main(["context", "--out_dir=out/x", "--device=cpu"])
    assert "window, sinks=1" in capsys.readouterr().out             # 4 sinks would leave no room
    sample_checkpoint("out/x", sample_gpt(block_size=1))
    with pytest.raises(ValueError, match="block_size=1 is too short"): bench.main(["context", "--out_dir=out/x", "--device=cpu"])


EVAL_LINES = [      # questions in the published formats: HellaSwag, ARC in two forms, MMLU
    {"activity_label": "Roof", "ctx_a": "A man [substeps] sits.", "ctx_b": "he", "ctx": "unused",
     "endings": ["runs [x] off.", "is", "jumps  up [title] End"], "label": 1},
    {"ctx": "A longer context, of which the first words do not fit, " * 3 + "so", "endings": ["it is cut", "not"], "label": "0"},
    {"question": {"stem": "Why?", "choices": [{"text": "Because", "label": "1"}, {"text": "So", "label": "2"}]},
     "answerKey": "2"},
    {"question": "Why?", "choices": {"text": ["Because", "So", "\u00fc"], "label": ["A", "B", "C"]}, "answerKey": "C"},
    {"question": " 1+1? ", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "high_school_sums"},
    {"question": "q", "choices": ["1", "2"], "answer": "B"},
    {"ctx": "x", "endings": ["y", "z and more"], "label": 0}]
EVAL_READ = [       # each as read: (context, endings, index of the right one)
    ("Roof: A man sits. He", ["runs off.", "is", "jumps up. End"], 1),
    (EVAL_LINES[1]["ctx"], ["it is cut", "not"], 0),
    ("Question: Why?\nAnswer:", ["Because", "So"], 1),
    ("Question: Why?\nAnswer:", ["Because", "So", "\u00fc"], 2),
    ("The following are multiple choice questions (with answers) about high school sums.\n\n"
     "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", ["A", "B", "C", "D"], 1),
    ("q\nA. 1\nB. 2\nAnswer:", ["A", "B"], 1),
    ("x", ["y", "z and more"], 0)]


def eval_read(task, tok, size):
    return bench.read_task(str(task), bench.task_lines(str(task)), tok, size)


def eval_plain(model, tok, context, ending):
    """The ending's log-probability after the context, from one pass over the whole text: no cache, no padding."""
    ending = tok.encode(" " + ending)
    ids = tok.encode(context) + ending
    logp = model(torch.tensor([ids[:-1]]))[0][0].double().log_softmax(-1)
    return sum(logp[i - 1, ids[i]].item() for i in range(len(ids) - len(ending), len(ids)))


@pytest.mark.parametrize("shape", SAMPLE_SHAPES)
def test_bench_eval_choices_equal_a_plain_computation(tmp_path, shape):
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, EVAL_LINES)) + "\n\n")
    model = sample_gpt(block_size=128, **shape)
    assert list(map(bench.read_question, EVAL_LINES)) == EVAL_READ
    questions = eval_read(tmp_path / "q.jsonl", sample_TOK, 128)
    expected = [[eval_plain(model, sample_TOK, sample_TOK.decode(ids), ending) for ending in endings]
                for (_, endings, _), (ids, *_) in zip(EVAL_READ, questions, strict=True)]
    for batch in (1, 3, 7):
        scores = [s for i in range(0, 7, batch) for s in bench.score(model, questions[i:i + batch])]
        for found, values in zip(scores, expected, strict=True): assert found == pytest.approx(values, abs=1e-4)
    assert [q[2:] for q in questions] == [([len(e) for e in endings], label) for _, endings, label in EVAL_READ]    # letters
    cut, endings = questions[1][:2]                 # a context too long keeps as much of its end as fits
    assert len(cut) + max(map(len, endings)) == 129 and EVAL_READ[1][0].endswith(sample_TOK.decode(cut))


@pytest.mark.parametrize("stride, n", [(32, 500), (7, 130), (64, 300), (1, 70), (32, 40), (32, 65)])
def test_bench_eval_text_scores_every_token_once_with_enough_context(stride, n):
    model, text = sample_gpt(), "".join(random.Random(0).choices("abc \u00fc\n", k=n))
    begin = sample_TOK.special_tokens["<|endoftext|>"]
    ids, want = [begin] + sample_TOK.encode(text), 0.0
    for i in range(1, len(ids)):            # the window that scores token i is the first that ends at or after i
        end = 64 if i <= 64 else min(64 + stride * -(-(i - 64) // stride), len(ids) - 1)
        start = max(0, end - 64) if len(ids) - 1 >= 64 else 0
        assert i <= 64 or i - start > 64 - stride
        want -= model(torch.tensor([ids[start:i]]))[0][0, -1].double().log_softmax(-1)[ids[i]].item()
    tok = bpe.Tokenizer.from_dict(sample_TOK.to_dict())
    tok.first = [begin]                                     # as sample.load sets it
    nats, tokens, size = bench.text_loss(model, tok, text, 3, stride)
    assert nats == pytest.approx(want, rel=1e-5) and tokens == len(ids) - 1 and size == len(text.encode())
    plain = bpe.Tokenizer(sample_TOK.merges)                # without an end-of-text to begin with, every token is still scored
    plain.first = plain.encode("\n")
    nats, tokens, size = bench.text_loss(model, plain, "abcabc", 2, stride)
    assert tokens == len(plain.encode("abcabc")) and size == 6


def test_bench_eval_goes_on_where_it_stopped_and_starts_anew_for_another_model(here, capsys, monkeypatch):
    path, out = here / "q.jsonl", str(here / "run")
    path.write_text("\n".join(json.dumps(EVAL_LINES[i % 7]) for i in range(23)))
    (here / "t.txt").write_text("the the the")
    sample_checkpoint(out, block_size=128)
    argv, score, scored = ["eval", f"--out_dir={out}", f"--task={path}", "--batch_size=4", "--device=cpu"], bench.score, []
    def counting(model, questions):
        if len(scored) == 3: raise KeyboardInterrupt
        scored.append(len(questions))
        return score(model, questions)
    monkeypatch.setattr(bench, "score", counting)
    with pytest.raises(KeyboardInterrupt): bench.main(argv)
    kept, = glob.glob("out/bench/eval_q_*.jsonl")
    with open(kept, "a") as f: f.write("\n[-1.25, -3")                          # as if a crash cut the line
    scored.clear()
    scored += [0] * 4
    bench.main(argv + [f"--input={here / 't.txt'}", "--stride=128"])
    out_text = capsys.readouterr().out
    assert scored[4:] == [4, 4, 3] and "resuming, 12 of 23" in out_text
    assert re.search("^task +questions +acc +acc_norm +chance$", out_text, re.M)
    n, nats, perplexity, bits = map(float, re.search(r"t.txt +11 +(.*)$", out_text, re.M)[1].replace(",", "").split())
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-2) and bits == pytest.approx(n * nats / math.log(2) / 11, rel=1e-3)
    model, right = model_py.GPT.load(os.path.join(out, "ckpt.pt")), [0, 0]
    assert sum(line.rstrip().endswith("]") for line in open(kept)) == 23
    for (ids, *_), i in zip(eval_read(path, sample_TOK, 128), range(23)):
        _, endings, label = EVAL_READ[i % 7]
        scores = [eval_plain(model, sample_TOK, sample_TOK.decode(ids), ending) for ending in endings]
        values = [v / len(e) for v, e in zip(scores, endings)]
        right = [n + (v.index(max(v)) == label) for n, v in zip(right, (scores, values))]
    acc, norm = (f"{p:.2%} +- {math.sqrt(p * (1 - p) / 22):.2%}" for p in (right[0] / 23, right[1] / 23))
    chance = sum(1 / len(EVAL_READ[i % 7][1]) for i in range(23)) / 23
    assert re.search(rf"^q +23 +{re.escape(acc)} +{re.escape(norm)} +{chance:.2%}$", out_text, re.M)
    other = sample_gpt(block_size=128)
    other.lm_head.weight[0] += 1
    tok = Tokenizer(sample_TOK.merges, GPT4_SPLIT, ("<|endoftext|>",)).to_dict()
    for change, anew in ((lambda: None, 0), (lambda: sample_checkpoint(out, other), 23),
                         (lambda: sample_checkpoint(out, other, tok), 23),
                         (lambda: path.write_text(path.read_text() + "\n" + json.dumps(EVAL_LINES[0])), 24)):
        change()
        scored[:] = [0] * 4
        bench.main(argv)
        assert sum(scored) == anew and ("resuming, 23 of 23" in capsys.readouterr().out) == (not anew)


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not in the form"), ("[]", "line 2"), ('{"ctx": "a", "endings": ["b"], "label": 1}', "line 2: not in the form"),
    ('{"ctx": "a", "endings": "bc", "label": 0}', "line 2"), ('{"ctx": "a", "endings": ["b", " "], "label": 0}', "line 2"),
    ('{"question": "a", "choices": ["b"], "answer": "C"}', "line 2"),
    ('{"question": {"stem": 1}, "answerKey": "A", "choices": {}}', "line 2"),
    ('{"ctx": "a", "endings": ["%s"], "label": 0}' % ("x y " * 90), "line 2: an ending of")])
def test_bench_eval_bad_questions_are_named(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(EVAL_LINES[-1]) + "\n" + line)
    with pytest.raises(ValueError, match=f"q.jsonl, {message}") as e: eval_read(tmp_path / "q.jsonl", sample_TOK, 64)
    assert "\n" not in str(e.value)


def test_bench_eval_user_errors(here, monkeypatch):
    sample_checkpoint("out/x")
    (here / "empty.txt").write_text("")
    (here / "one.jsonl").write_text("\n")
    for words, message in (([], "say what to evaluate"), (["--task=nope"], "nor one of hellaswag"),
                           (["--task=one.jsonl"], "has no questions"), (["--input=nope.txt"], "no file 'nope.txt'"),
                           (["--input=empty.txt"], "nothing to score"), (["--input=one.jsonl"], "scored as plain text"),
                           (["--input=empty.txt", "--stride=65"], "stride=65 is longer")):
        with pytest.raises(ValueError, match=message): bench.main(["eval", "--device=cpu", *words])
    strides = []
    monkeypatch.setattr(bench, "text_loss", lambda *args: strides.append(args[-1]) or (1.0, 1, 1))
    for size in (64, 1):
        sample_checkpoint("out/x", sample_gpt(block_size=size))
        bench.main(["eval", "--device=cpu", "--out_dir=out/x", "--input=empty.txt"])
    assert strides == [32, 1]


def test_bench_eval_unpacks_the_published_files(here, monkeypatch):
    """Archives laid out like the published ones, in place of the downloads."""
    arc = json.dumps(EVAL_LINES[2]) + "\n"
    questions = {"Easy-Train": 4, "Easy-Test": 2, "Challenge-Train": 3, "Challenge-Test": 1}
    tables = {"data/test/anatomy_test.csv": b'"A, ""b""\nc",1,2,3,4,D\r\nq,5,6,7,8,A\r\n',
              "data/dev/anatomy_dev.csv": b"no,1,2,3,4,A\n", "data/test/abstract_algebra_test.csv": b"r,1,2,3,4,B\n"}
    def fetch(url, path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if url.endswith(".zip"):
            with zipfile.ZipFile(path, "w") as z:
                for name, n in questions.items():
                    z.writestr(f"ARC-V1-Feb2018-2/ARC-{name.split('-')[0]}/ARC-{name}.jsonl", arc * n)
        elif url.endswith(".tar"):
            with tarfile.open(path, "w") as tar:
                for name, data in tables.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        else: open(path, "w").write(json.dumps(EVAL_LINES[0]))
    monkeypatch.setattr(prepare, "fetch", fetch)
    tasks = "hellaswag", "arc_easy", "arc_challenge", "mmlu"
    read = {task: eval_read(task, sample_TOK, 640) for task in tasks}
    assert {task: len(q) for task, q in read.items()} == {"hellaswag": 1, "arc_easy": 2, "arc_challenge": 1, "mmlu": 3}
    assert [q[3] for q in read["mmlu"]] == [1, 3, 0] and "abstract algebra.\n\nr\nA. 1" in sample_TOK.decode(read["mmlu"][0][0])
    assert 'A, "b"\nc\nA. 1\n' in sample_TOK.decode(read["mmlu"][1][0])
    monkeypatch.setattr(prepare, "fetch", lambda url, path: None)
    open("data/eval/data.tar", "wb").write(b"broken")
    with pytest.raises(ValueError, match="data.tar is damaged"): bench.task_lines("mmlu")
