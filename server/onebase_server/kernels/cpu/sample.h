// Drawing one token a row from edited logits: the same meaning as engine/sampler.py, whose tests it passes. A row is
// one thread's work from start to end, in a fixed order, so neighbours can't change its token.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "model.h"

namespace onebase {

struct Draw {  // mirrored in kernels/cpu_abi.py
    double uniform;
    float temperature, top_p, min_p;
    int32_t top_k, greedy;
};

inline int argmax(const float* logits, int n) {
    v16f best = splat(-std::numeric_limits<float>::infinity());
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const v16f x = load(logits + i);
        best = x > best ? x : best;
    }
    float top = max_of(best);
    for (; i < n; i++) top = logits[i] > top ? logits[i] : top;
    for (i = 0; i < n; i++)
        if (logits[i] == top) return i;
    return 0;  // every logit is NaN
}

struct Candidate {
    float weight;
    int32_t token;
    bool operator<(const Candidate& other) const {
        return weight != other.weight ? weight > other.weight : token < other.token;
    }
};

class RowSampler {
    static constexpr int CHUNK = 512;
    std::vector<float> weights_;
    std::vector<double> sums_;  // of each chunk
    std::vector<Candidate> kept_;
    double total_ = 0;

    // weights_ = exp((logit - max) / temperature): 1 at the likeliest, 0 where banned.
    void weigh(const float* logits, int n, float temperature) {
        const float top = logits[argmax(logits, n)], inverse = 1.0f / temperature;
        weights_.assign((n + CHUNK - 1) / CHUNK * CHUNK, 0.0f);
        sums_.clear();
        total_ = 0;
        for (int first = 0; first < n; first += CHUNK) {
            const int end = std::min(n, first + CHUNK);
            int i = first;
            for (; i + LANES <= end; i += LANES) store(&weights_[i], vexp((load(logits + i) - splat(top)) * splat(inverse)));
            for (; i < end; i++) weights_[i] = vexp(splat((logits[i] - top) * inverse))[0];
            double sum = 0;
            for (i = first; i < first + CHUNK; i += LANES) sum += onebase::sum(load(&weights_[i]));
            sums_.push_back(sum);
            total_ += sum;
        }
    }

    int draw_plain(double uniform, int n) const {
        double left = uniform * total_;
        int chunk = 0;
        while (chunk + 1 < int(sums_.size()) && left >= sums_[chunk]) left -= sums_[chunk++];
        int last = 0;
        for (int i = chunk * CHUNK; i < std::min(n, (chunk + 1) * CHUNK); i++) {
            if (weights_[i] > 0) last = i;
            left -= weights_[i];
            if (left < 0) return i;
        }
        return last;
    }

    // Tokens of weight >= `least`, likeliest first.
    void collect(float least, int n) {
        kept_.clear();
        for (int i = 0; i < n; i++)
            if (weights_[i] >= least && weights_[i] > 0) kept_.push_back({weights_[i], i});
    }

    int draw_truncated(const Draw& draw, int n) {
        const int most = draw.top_k > 0 ? std::min(draw.top_k, n) : n;
        const bool by_mass = draw.top_p < 1 && most == n;
        for (float least = 1e-2f;; least *= 1e-2f) {
            const bool everything = least < 1e-30f;
            collect(std::max(draw.min_p, everything ? 0.0f : least), n);
            if (everything || draw.min_p >= least) break;
            if (by_mass && draw.min_p <= 0) {
                double mass = 0;
                for (const Candidate& c : kept_) mass += c.weight;
                if (mass >= double(draw.top_p) * total_) break;
            } else if (int(kept_.size()) >= most) break;
        }
        std::sort(kept_.begin(), kept_.end());
        if (int(kept_.size()) > most) kept_.resize(most);
        double total = total_;
        if (!by_mass || draw.min_p > 0) {
            total = 0;
            for (const Candidate& c : kept_) total += c.weight;
        }
        double mass = 0;
        size_t count = 0;
        while (count < kept_.size() && (count == 0 || mass < double(draw.top_p) * total)) mass += kept_[count++].weight;
        double left = draw.uniform * mass;
        for (size_t i = 0; i + 1 < count; i++) {
            left -= kept_[i].weight;
            if (left < 0) return kept_[i].token;
        }
        return count ? kept_[count - 1].token : 0;
    }

  public:
    int draw(const float* logits, int n, const Draw& draw) {
        if (draw.greedy) return argmax(logits, n);
        weigh(logits, n, draw.temperature);
        const bool truncated = draw.top_p < 1 || draw.top_k > 0 || draw.min_p > 0;
        return truncated ? draw_truncated(draw, n) : draw_plain(draw.uniform, n);
    }
};

}  // namespace onebase
