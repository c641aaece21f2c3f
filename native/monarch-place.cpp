#include "monarch-place.h"

#include "monarch-codec.h"
#include "monarch-state.h"
#include "monarch-summary.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <stdexcept>
#include <string>

ggml_backend_buffer_type_t monarch_place_get_buft(monarch_place place, ggml_backend_dev_t dev) {
    return place == MONARCH_PLACE_HOST ? ggml_backend_cpu_buffer_type() : ggml_backend_dev_buffer_type(dev);
}

ggml_backend_buffer_type_t monarch_place_get_pool_buft(monarch_place place, ggml_backend_dev_t dev) {
    if (place != MONARCH_PLACE_MAPPED || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return monarch_place_get_buft(place, dev);
    }

    // several devices that share each layer have none
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    if (!reg) {
        return nullptr;
    }

    const auto get_mapped = (ggml_backend_buffer_type_t (*)(ggml_backend_dev_t))
        ggml_backend_reg_get_proc_address(reg, MONARCH_MAPPED_BUFFER_TYPE);

    return get_mapped ? get_mapped(dev) : nullptr;
}

// whether the device computes the op on a cold store at this place
static bool monarch_place_is_supported(monarch_place place, ggml_backend_dev_t dev, const llama_memory_params & params, const monarch_op_params & op) {
    ggml_backend_buffer_type_t pool_buft = monarch_place_get_pool_buft(place, dev);
    if (!pool_buft) {
        return false;
    }

    ggml_init_params init_params = {
        /*.mem_size   =*/ 16*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr        ctx      { ggml_init(init_params) };
    ggml_backend_buffer_ptr buf      { ggml_backend_buft_alloc_buffer(monarch_place_get_buft(place, dev), 0) };
    ggml_backend_buffer_ptr pool_buf { ggml_backend_buft_alloc_buffer(pool_buft, 0) };
    if (!ctx || !buf || !pool_buf) {
        return false;
    }

    const int64_t head_dim = op.codec.head_dim;

    ggml_tensor * q       = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, head_dim, 1, 1);
    ggml_tensor * k       = ggml_new_tensor_3d(ctx.get(), params.type_k, head_dim, 1, 1);
    ggml_tensor * v       = ggml_new_tensor_3d(ctx.get(), params.type_v, head_dim, 1, 1);
    ggml_tensor * mask    = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 1);
    ggml_tensor * pool    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I8, monarch_codec_block_size(&op.codec), MONARCH_SUMMARY_GROUP, 1);
    ggml_tensor * summary = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I8, MONARCH_SUMMARY_GROUP*monarch_summary_size(head_dim), 1, 1);
    ggml_tensor * state   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, monarch_state_size(1, MONARCH_SUMMARY_GROUP));
    ggml_tensor * input   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1);

    pool->buffer = pool_buf.get();
    summary->buffer = state->buffer = buf.get();

    return ggml_backend_dev_supports_op(dev, ggml_monarch_attend  (ctx.get(), &op, q, k, v, mask, pool, summary, state, nullptr, input)) &&
           ggml_backend_dev_supports_op(dev, ggml_monarch_page_out(ctx.get(), &op, k, v, pool, summary, state, nullptr, input));
}

// null, or the first device of the model's layers that cannot have the cache at this place
static ggml_backend_dev_t monarch_place_find_unsupported(
        monarch_place place, const llama_model & model, const llama_memory_params & params, const monarch_op_params & op) {
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        ggml_backend_dev_t dev = model.dev_layer(il);

        const bool is_new = il == 0 || dev != model.dev_layer(il - 1);
        if (is_new && !monarch_place_is_supported(place, dev, params, op)) {
            return dev;
        }
    }
    return nullptr;
}

static bool monarch_place_has_tiers(monarch_place place, const llama_model & model) {
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        ggml_backend_dev_t dev = model.dev_layer(il);

        if (monarch_place_get_buft(place, dev) != monarch_place_get_pool_buft(place, dev)) {
            return true;
        }
    }
    return false;
}

static monarch_place monarch_place_choose(
        const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, const monarch_knobs & knobs, const monarch_op_params & op) {
    if (!cparams.offload_kqv) {
        return MONARCH_PLACE_HOST;
    }

    const monarch_place place = knobs.cold_tier == MONARCH_COLD_TIER_RAM ? MONARCH_PLACE_MAPPED : MONARCH_PLACE_DEVICE;

    ggml_backend_dev_t dev = monarch_place_find_unsupported(place, model, params, op);
    if (!dev) {
        return place;
    }
    if (knobs.cold_tier == MONARCH_COLD_TIER_DEVICE) {
        throw std::runtime_error(std::string("cold_tier = device: ") + ggml_backend_dev_name(dev) + " has no kernels for this cache; use auto or ram");
    }

    LLAMA_LOG_WARN("%s: %s has no kernels for this cache%s: it lies in host memory and is attended by the CPU\n", __func__, ggml_backend_dev_name(dev),
            place == MONARCH_PLACE_MAPPED ? " there" : "");
    return MONARCH_PLACE_HOST;
}

monarch_place monarch_place_find(
        const llama_model         & model,
        const llama_memory_params & params,
        const llama_cparams       & cparams,
        const monarch_knobs       & knobs,
        const monarch_op_params   & op) {
    const monarch_place res = monarch_place_choose(model, params, cparams, knobs, op);

    if (knobs.frames > 0 && !monarch_place_has_tiers(res, model)) {
        throw std::runtime_error("frames = " + std::to_string(knobs.frames) + ": frames need cold_tier = ram and a device that attends pages in host memory; use 0");
    }
    return res;
}
