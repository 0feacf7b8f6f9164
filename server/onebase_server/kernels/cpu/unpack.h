// Rows of a repacked weight as plain values [count][k]: code * absmax in fp32, or that rounded to bf16.
#pragma once

#include "matmul_wide.h"

namespace onebase {

// 64 values of feature f from its block; see cpu_ops.py for both layouts.
template <typename T>
inline void unpack_block(const uint8_t* source, int f, int amx, const float* code, T* out) {
    const v16f absmax = splat(((const float*)source)[f]);
    if (amx) {  // a 16-bit word j of a pair of features: k = j and 32 + j of the even one, then of the odd one
        const uint8_t* words = source + 64 + 64 * (f / 2) + f % 2;
        for (int q = 0; q < 2; q++) {
            uint32_t own[LANES];
            for (int i = 0; i < LANES; i++) own[i] = words[2 * (16 * q + i)];
            const v16u word = read<v16u>(own);
            store_narrow(out + 16 * q, lookup(code, word) * absmax);
            store_narrow(out + 32 + 16 * q, lookup(code, word >> 4) * absmax);
        }
        return;
    }
    for (int q = 0; q < 4; q++) {  // a 32-bit word of feature f in group c: k = 8 c .. 8 c + 7
        uint32_t pair[2];
        for (int i = 0; i < 2; i++) memcpy(&pair[i], source + 64 + 64 * (2 * q + i) + 4 * f, 4);
        uint32_t own[LANES];
        for (int i = 0; i < LANES; i++) own[i] = pair[i / 8] >> 4 * (i % 8);
        store_narrow(out + 16 * q, lookup(code, read<v16u>(own)) * absmax);
    }
}

template <typename T>
inline void unpack_rows(const uint8_t* data, const float* code, int first, int count, int k, int amx, T* out) {
    const int blocks = k / BLOCK;
    for (int row = 0; row < count; row++) {
        const int strip = (first + row) / STRIP, f = (first + row) % STRIP;
        for (int kb = 0; kb < blocks; kb++)
            unpack_block(data + (size_t(strip) * blocks + kb) * BLOCK_BYTES, f, amx, code, out + size_t(row) * k + kb * BLOCK);
    }
}

}  // namespace onebase
