#include "monarch-op.h"

#include "ggml-impl.h"

#include <string.h>

static void monarch_op_set_params(struct ggml_tensor * result, const struct monarch_op_params * params, int32_t kind) {
    struct monarch_op_params op_params = *params;
    op_params.kind = kind;
    ggml_set_op_params(result, &op_params, sizeof(op_params));

    result->op = GGML_OP_MONARCH;
}

struct ggml_tensor * ggml_monarch_attend(
        struct ggml_context            * ctx,
        const struct monarch_op_params * params,
        struct ggml_tensor             * q,
        struct ggml_tensor             * k,
        struct ggml_tensor             * v,
        struct ggml_tensor             * mask,
        struct ggml_tensor             * pool,
        struct ggml_tensor             * summary,
        struct ggml_tensor             * state,
        struct ggml_tensor             * frames,
        struct ggml_tensor             * table) {
    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(q->ne[0] == k->ne[0] && q->ne[0] == v->ne[0] && q->ne[0] == params->codec.head_dim);
    GGML_ASSERT(q->ne[1] % k->ne[1] == 0);
    GGML_ASSERT(k->ne[2] == mask->ne[0] && q->ne[2] == mask->ne[1]*mask->ne[3]);
    GGML_ASSERT(mask->type == GGML_TYPE_F16 || mask->type == GGML_TYPE_F32);

    struct ggml_tensor * result = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, q->ne[0], q->ne[1], q->ne[2]);

    monarch_op_set_params(result, params, MONARCH_OP_ATTEND);

    result->src[MONARCH_ATTEND_Q]       = q;
    result->src[MONARCH_ATTEND_K]       = k;
    result->src[MONARCH_ATTEND_V]       = v;
    result->src[MONARCH_ATTEND_MASK]    = mask;
    result->src[MONARCH_ATTEND_POOL]    = pool;
    result->src[MONARCH_ATTEND_SUMMARY] = summary;
    result->src[MONARCH_ATTEND_STATE]   = state;
    result->src[MONARCH_ATTEND_TABLE]   = table;
    result->src[MONARCH_ATTEND_FRAMES]  = frames;

    return result;
}

struct ggml_tensor * ggml_monarch_page_out(
        struct ggml_context            * ctx,
        const struct monarch_op_params * params,
        struct ggml_tensor             * k,
        struct ggml_tensor             * v,
        struct ggml_tensor             * pool,
        struct ggml_tensor             * summary,
        struct ggml_tensor             * state,
        struct ggml_tensor             * frames,
        struct ggml_tensor             * page_outs) {
    struct ggml_tensor * result = ggml_view_tensor(ctx, pool);

    monarch_op_set_params(result, params, MONARCH_OP_PAGE_OUT);

    result->src[MONARCH_PAGE_OUT_POOL]    = pool;
    result->src[MONARCH_PAGE_OUT_K]       = k;
    result->src[MONARCH_PAGE_OUT_V]       = v;
    result->src[MONARCH_PAGE_OUT_SUMMARY] = summary;
    result->src[MONARCH_PAGE_OUT_STATE]   = state;
    result->src[MONARCH_PAGE_OUT_PAGES]   = page_outs;
    result->src[MONARCH_PAGE_OUT_FRAMES]  = frames;

    return result;
}

const struct ggml_tensor * ggml_monarch_get_store(const struct ggml_tensor * dst) {
    struct monarch_op_params params;
    memcpy(&params, dst->op_params, sizeof(params));

    return params.kind == MONARCH_OP_ATTEND ? dst->src[MONARCH_ATTEND_POOL] : dst->src[MONARCH_PAGE_OUT_POOL];
}
