// What the hardware does in the background, on the host: when it is done is a matter of chance, at once or as late as somebody waits for it.
#pragma once

#include "cuda_runtime.h"

namespace background {

using Work = std::function<void()>;

// What a thread commits in groups and waits for by their number.
class Groups {
public:
    explicit Groups(bool in_order = false) : in_order_(in_order) {}
    void add(Work work) {
        if (fibers::chance() % 2 && !(in_order_ && any())) work();
        else own().open.push_back(std::move(work));
    }
    void commit() {
        Queue& q = own();
        q.committed.push_back(std::move(q.open));
        q.open.clear();
    }
    void wait(int pending) {
        Queue& q = own();
        while (int(q.committed.size()) > pending) {
            for (Work& work : q.committed.front()) work();
            q.committed.pop_front();
        }
    }
    void wait_all() {
        Queue& q = own();
        wait(0);
        for (Work& work : q.open) work();
        q.open.clear();
    }
    // Whether something is left to do.
    bool any() {
        Queue& q = own();
        for (const auto& group : q.committed)
            if (!group.empty()) return true;
        return !q.open.empty();
    }

private:
    struct Queue {
        std::vector<Work> open;
        std::deque<std::vector<Work>> committed;
    };
    Queue& own() { return queues_[threadIdx.x]; }
    const bool in_order_;
    Queue queues_[1024];    // of the threads
};

}  // namespace background
