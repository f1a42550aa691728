// Paged attention of sequences that have one new token each; see attention.c.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct decodes {
    size_t sequences;
    size_t heads, kv_heads, head_size;
    size_t block_size, blocks_per_row;  // tokens of a block; entries of a row of block_tables
    size_t rotary_dim, ntk_length, logn_length;  // the last two: 0 turns the rule off
    double rotary_base, score_scale;             // score_scale: 1 / (q_scaling sqrt(head_size))
    const void *qkv;      // [sequences, heads + 2 kv_heads, head_size]
    int format;           // of qkv and context
    void *pool;           // [blocks, 2, kv_heads, block_size, head_size]
    int pool_format;
    float *pool_scales;   // [blocks, 2, kv_heads, block_size] if the pool is int8
    const int32_t *positions, *lengths, *prompts;  // [sequences]: of the token, with the token, of the prompt
    const int32_t *block_tables;                   // [sequences, blocks_per_row]
    void *context;        // [sequences, heads, head_size]
};

// 0, or -1 without memory.
int attend(const struct decodes *decodes);
