"""llama.cpp's runtime, called through cffi: log-probabilities of a GGUF file, with an adapter or without."""

from pathlib import Path
from typing import Any

import numpy as np

# include/llama.h of v0.5.0, the release that the converters and the runtime of fetch.py are. Enumerations are ints.
HEADER = """
typedef struct llama_model llama_model;
typedef struct llama_context llama_context;
typedef struct llama_adapter_lora llama_adapter_lora;
typedef struct llama_vocab llama_vocab;
struct llama_model_params {
    void *devices, *tensor_buft_overrides;
    int32_t n_gpu_layers, split_mode, load_mode, lazy_mode, main_gpu;
    float *tensor_split;
    void *progress_callback, *progress_callback_user_data, *kv_overrides;
    bool vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp;
};
struct llama_context_params {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
    int32_t n_threads, n_threads_batch, ctx_type, rope_scaling_type, pooling_type, attention_type, flash_attn_type;
    float rope_freq_base, rope_freq_scale, yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow;
    uint32_t yarn_orig_ctx;
    float defrag_thold;
    void *cb_eval, *cb_eval_user_data;
    int32_t type_k, type_v;
    void *abort_callback, *abort_callback_data;
    bool embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified;
    void *samplers;
    size_t n_samplers;
    void *ctx_other;
};
typedef struct {
    int32_t n_tokens, *token;
    float *embd;
    int32_t *pos, *n_seq_id, **seq_id;
    int8_t *logits;
} llama_batch;
void llama_log_set(void (*callback)(int level, const char *text, void *data), void *data);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
llama_model *llama_model_load_from_file(const char *path, struct llama_model_params params);
const llama_vocab *llama_model_get_vocab(const llama_model *model);
int32_t llama_vocab_n_tokens(const llama_vocab *vocab);
llama_context *llama_init_from_model(llama_model *model, struct llama_context_params params);
llama_adapter_lora *llama_adapter_lora_init(llama_model *model, const char *path);
int32_t llama_set_adapters_lora(llama_context *context, llama_adapter_lora **adapters, size_t n, float *scales);
llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max);
void llama_batch_free(llama_batch batch);
int32_t llama_decode(llama_context *context, llama_batch batch);
float *llama_get_logits(llama_context *context);
void llama_free(llama_context *context);
void llama_model_free(llama_model *model);
"""


class Llama:
    """The libraries of ``directory``. What they complain of is kept in ``said``."""

    def __init__(self, directory: Path):
        import cffi

        self.ffi = ffi = cffi.FFI()
        ffi.cdef(HEADER)
        backends = cffi.FFI()
        backends.cdef("void ggml_backend_load_all_from_path(const char *path);")
        self.said: list[str] = []

        @ffi.callback("void(int, const char *, void *)")
        def hear(level: int, text: Any, _: Any) -> None:
            if level >= 4:  # errors
                self.said.append(ffi.string(text).decode("utf-8", "replace").strip())

        self._kept = hear
        (ggml,), (llama,) = (sorted(directory.glob(f"lib{name}.v*.so")) for name in ("ggml", "llama"))
        self._ggml = backends.dlopen(str(ggml))
        self.library: Any = ffi.dlopen(str(llama))
        self.library.llama_log_set(hear, ffi.NULL)
        self._ggml.ggml_backend_load_all_from_path(str(directory).encode())
        context = self.library.llama_context_default_params()
        # The values of another header would stand elsewhere.
        assert (context.n_ctx, context.type_k, context.type_v) == (512, 1, 1)
        assert (context.flash_attn_type, context.offload_kqv, context.n_samplers) == (-1, True, 0)

    def log_probabilities(self, model: Path, tokens: list[int], adapter: Path | None = None) -> np.ndarray:
        """``[len(tokens), vocabulary]``, float32 throughout.

        Raises:
            RuntimeError: llama.cpp does not take the file; what it said.
        """
        ffi, library = self.ffi, self.library
        self.said.clear()
        loaded = library.llama_model_load_from_file(str(model).encode(), library.llama_model_default_params())
        if loaded == ffi.NULL:
            raise RuntimeError("; ".join(self.said))
        params = library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = params.type_k = params.type_v = 0  # off; float32
        context = library.llama_init_from_model(loaded, params)
        batch = library.llama_batch_init(len(tokens), 0, 1)
        try:
            if adapter is not None:
                lora = library.llama_adapter_lora_init(loaded, str(adapter).encode())
                if lora == ffi.NULL:
                    raise RuntimeError("; ".join(self.said))
                scales, adapters = ffi.new("float[1]", [1.0]), ffi.new("llama_adapter_lora *[1]", [lora])
                assert library.llama_set_adapters_lora(context, adapters, 1, scales) == 0
            batch.n_tokens = len(tokens)
            for at, token in enumerate(tokens):
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
                batch.seq_id[at][0] = 0
            assert library.llama_decode(context, batch) == 0, self.said
            size = len(tokens) * library.llama_vocab_n_tokens(library.llama_model_get_vocab(loaded))
            logits = np.frombuffer(ffi.buffer(library.llama_get_logits(context), size * 4), np.float32)
            logits = logits.reshape(len(tokens), -1).astype(np.float64)
        finally:
            library.llama_batch_free(batch)
            library.llama_free(context)
            library.llama_model_free(loaded)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
